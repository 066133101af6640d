"""`release.yaml` as its author writes it (`ReleaseSpec`) and as it is frozen (`Manifest`).

A spec may leave things to be found out (`commit: auto`, no contract yet). A manifest never does:
it holds digests, sizes and resolved values only, and its own digest is the release's identity. The
version number is a name for the content, so it is not part of the digest.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveInt,
    model_validator,
)

from shipworthy.domain.canonical import digest_of
from shipworthy.domain.contract import Contract
from shipworthy.domain.names import MODEL

ArtifactFormat = Literal["skops", "joblib", "pickle", "onnx", "python", "file"]
CODE_FORMATS: frozenset[str] = frozenset({"joblib", "pickle"})
"""Formats that run code when loaded: scanned, and refused without a stated reason."""


def matching(pattern: str, meaning: str) -> AfterValidator:
    """A constraint on text whose error says what is wanted, instead of showing the expression."""
    compiled = re.compile(pattern, re.ASCII)

    def check(text: str) -> str:
        if not compiled.fullmatch(text):
            message = f"must be {meaning}"
            raise ValueError(message)
        return text

    return AfterValidator(check)


Name = Annotated[
    str,
    matching(
        r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}",
        "1 to 63 letters, digits, '.', '_' and '-', beginning with a letter or digit",
    ),
]
ModelName = Annotated[
    str,
    matching(
        MODEL.pattern,
        "1 to 63 of a-z, 0-9, '.', '_' and '-', beginning and ending with a letter or digit",
    ),
]
Digest = Annotated[
    str, matching(r"sha256:[0-9a-f]{64}", "'sha256:' and 64 hexadecimal digits in lower case")
]
Scalar = str | int | float | bool | None
_NUMBERS = frozenset(
    {"temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"}
)
_COUNTS = frozenset({"max_tokens", "max_completion_tokens", "n", "top_k", "seed", "top_logprobs"})
_NO_SAMPLING = frozenset(
    {"model", "messages", "prompt", "input", "stream", "stream_options", "tools", "tool_choice"}
)


class Document(BaseModel):
    """A part of a file that a user writes: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _relative(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts:
        message = "must be a path inside the release's folder, without '..'"
        raise ValueError(message)
    return str(pure)


RelativePath = Annotated[str, AfterValidator(_relative)]


class Owner(Document):
    """Who answers for the model."""

    name: str = Field(min_length=1)
    email: str = Field(min_length=3)


class ArtifactSpec(Document):
    """A file or folder that the release is made of.

    `unsafe` is the stated reason for loading a format that can run code. `entry` names the callable
    of a `python` artifact (`predict` by default).
    """

    path: RelativePath
    format: ArtifactFormat = "file"
    unsafe: str | None = Field(default=None, min_length=8)
    entry: str | None = None


class CodeSpec(Document):
    """The repository that made the release; `dirty` says what to do about uncommitted changes."""

    repository: str = "."
    commit: str = "auto"
    dirty: Literal["record", "refuse"] = "record"


class EnvironmentSpec(Document):
    """The interpreter that serves the release, built from `lock`; absent means Shipworthy's own."""

    lock: RelativePath | None = None
    python: (
        Annotated[str, matching(r"3\.\d{1,2}", 'a Python version in quotes, such as "3.11"')] | None
    ) = None
    image: str | None = None


class DataSpec(Document):
    """Data that the release was made from or measured on."""

    name: Name
    path: str
    role: Literal["train", "validation", "test", "sample", "reference"]


class Base(Document):
    """The model that this one was tuned from."""

    model: str
    revision: str | None = None
    digest: Digest | None = None
    adapter: dict[str, Scalar] = Field(default_factory=dict)


class Training(Document):
    """How the model was trained, so that it can be trained again."""

    command: str | None = None
    seed: int | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    reward_model: str | None = None


class InferenceSpec(Document):
    """What runs the model, in which version and precision."""

    engine: Literal["sklearn", "onnx", "python", "external"] | None = None
    engine_version: str = "auto"
    precision: str | None = None
    sampling: dict[str, Scalar | tuple[str, ...]] = Field(default_factory=dict)


class BehaviourSpec(Document):
    """What a release adds to each request for a language model: it may differ in nothing else.

    `system` is the prompt put before the client's messages, `chat_template` is passed to servers
    that take one, `tools` are offered unless the client brings its own. Sampling is in
    `inference.sampling`; with `pin_sampling` it replaces what the client sends, else it fills in
    what the client leaves out. `retrieval_index` and `output_guard` are pinned by digest.
    """

    system: str | None = None
    chat_template: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: str | dict[str, Any] | None = None
    pin_sampling: bool = False
    retrieval_index: Digest | None = None
    output_guard: Digest | None = None


class Resources(Document):
    """What one replica needs."""

    cpu: Annotated[float, Field(gt=0)] = 1
    memory: Annotated[str, matching(r"\d+(\.\d+)?(Mi|Gi)", "a size such as 512Mi or 2Gi")] = "1Gi"
    gpu: Annotated[int, Field(ge=0)] = 0


class Replicas(Document):
    """How many replicas may run."""

    min: PositiveInt = 1
    max: PositiveInt = 1

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max < self.min:
            message = f"max ({self.max}) is below min ({self.min})"
            raise ValueError(message)
        return self


_OURS = "shipworthy serve"


class ProcessServing(Document):
    """Replicas that Shipworthy starts as local processes.

    `concurrency` is how many calls each may be answering at once.
    """

    runtime: Literal["process"] = "process"
    command: str = "shipworthy serve {release}"
    resources: Resources = Resources()
    replicas: Replicas = Replicas()
    concurrency: PositiveInt | None = None


class EndpointServing(Document):
    """A server elsewhere; `credential` refers to a secret (`env:NAME` or `file:PATH`).

    `concurrency` is how many calls each URL may be answering at once.
    """

    runtime: Literal["endpoint"]
    urls: tuple[Annotated[str, matching(r"https?://\S+", "an http:// or https:// URL")], ...] = (
        Field(min_length=1)
    )
    served_model: str
    credential: (
        Annotated[
            str,
            matching(
                r"(env|file):\S+",
                "env:NAME or file:PATH, a reference to the secret and never the secret itself",
            ),
        ]
        | None
    ) = None
    concurrency: PositiveInt | None = None


Serving = Annotated[ProcessServing | EndpointServing, Field(discriminator="runtime")]


class Metric(Document):
    """A measured value that the release claims.

    With `n` alone, `value` is a proportion and its interval is Wilson's; else give `std_error`.
    """

    value: float
    n: PositiveInt | None = None
    std_error: NonNegativeFloat | None = None


class Cost(Document):
    """What serving costs, in the currency that the team uses throughout."""

    per_hour: NonNegativeFloat | None = None
    per_call: NonNegativeFloat | None = None
    per_1k_input_tokens: NonNegativeFloat | None = None
    per_1k_output_tokens: NonNegativeFloat | None = None


class _Common(Document):
    """What spec and manifest share word for word."""

    model: ModelName
    description: str = ""
    owner: Owner | None = None
    base: Base | None = None
    training: Training = Training()
    serving: Serving = ProcessServing()
    metrics: dict[Name, dict[Name, Metric]] = Field(default_factory=dict)
    cost: Cost | None = None


class ReleaseSpec(_Common):
    """`release.yaml`, before anything is looked up or hashed."""

    version: PositiveInt | None = None
    behaviour: BehaviourSpec | None = None
    artifacts: tuple[ArtifactSpec, ...] = ()
    code: CodeSpec | None = None
    environment: EnvironmentSpec = EnvironmentSpec()
    data: tuple[DataSpec, ...] = ()
    contract: Contract | None = None
    inference: InferenceSpec = InferenceSpec()

    @model_validator(mode="after")
    def _runs_something(self) -> Self:
        if isinstance(self.serving, ProcessServing) and not self.artifacts:
            message = "nothing to serve: list artifacts, or give serving.runtime: endpoint"
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _speaks_one_language(self) -> Self:
        problem = _contradiction(self)
        if problem:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _samples(self) -> Self:
        language = self.contract is not None and not self.contract.tensors
        for name, value in self.inference.sampling.items() if language else ():
            problem = _sampling_problem(name, value)
            if problem:
                message = f"inference.sampling.{name} {problem}"
                raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _tells_no_password(self) -> Self:
        """Only of a new release: one that was registered never changes, and stays a way back."""
        urls = self.serving.urls if isinstance(self.serving, EndpointServing) else ()
        if any(re.match(r"https?://[^/?#]*@", url) for url in urls):
            message = (
                "a URL in serving.urls holds user:password@; leave that out, and name a secret by"
                " 'credential: env:NAME'"
            )
            raise ValueError(message)
        return self


def _contradiction(spec: ReleaseSpec) -> str:
    """What the contract says against the rest of a new release; empty where it says nothing."""
    contract = spec.contract
    if contract is None or contract.tensors:
        if spec.behaviour is not None:
            return (
                "behaviour is for language models; say 'contract: {protocol: openai}', or leave"
                " behaviour out"
            )
        if contract is not None and contract.operations:
            return "contract.operations are an openai contract's; leave them out"
    elif contract.inputs or contract.outputs:
        return "an openai contract has no inputs and outputs; its operations say what it does"
    elif len(set(contract.operations)) < len(contract.operations):
        return "contract.operations names one twice; name each once"
    ours = isinstance(spec.serving, ProcessServing) and spec.serving.command.startswith(_OURS)
    if contract is not None and contract.protocol != "oip-v2" and ours:
        return (
            f"'shipworthy serve' does not speak {contract.protocol}; give serving.runtime:"
            " endpoint, or a serving.command that does"
        )
    return ""


def _sampling_problem(name: str, value: object) -> str:
    """What is wrong with a field that is added to requests; empty for nothing, as far as known."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in _NO_SAMPLING:
        return "is no sampling; requests, tools and streams are said elsewhere"
    if name in _NUMBERS and not number:
        return f"must be a number, not {value!r}"
    if name in _COUNTS and not (number and isinstance(value, int)):
        return f"must be a whole number, not {value!r}"
    return ""


class PinnedFile(Document):
    """One file: its path inside the artifact or data set, digest and size in bytes.

    `path` is `.` where the artifact is itself one file. A data set of one file keeps the file's
    name, whose ending says how to read it.
    """

    path: str
    digest: Digest
    size: Annotated[int, Field(ge=0)]


class Artifact(Document):
    """A stored artifact; a folder has one entry in `files` for each file below it."""

    path: RelativePath
    format: ArtifactFormat
    files: tuple[PinnedFile, ...] = Field(min_length=1)
    unsafe: str | None = None
    entry: str | None = None
    scan: str | None = None

    def placed(self) -> tuple[tuple[str, PinnedFile], ...]:
        """Each file with its path in the folder that the release starts from."""
        return tuple((str(PurePosixPath(self.path, file.path)), file) for file in self.files)


class Code(Document):
    """The commit that made the release and the digest of what was not committed, if anything."""

    commit: str
    uncommitted: Digest | None = None


class Environment(Document):
    """The pinned serving interpreter; `lock` is absent when it is Shipworthy's own."""

    lock: PinnedFile | None = None
    python: str | None = None
    image: str | None = None


class Data(Document):
    """Data pinned by digest over all of its bytes."""

    name: Name
    role: str
    files: tuple[PinnedFile, ...]


class Inference(Document):
    """What runs the model, resolved."""

    engine: Literal["sklearn", "onnx", "python", "external"]
    engine_version: str
    precision: str | None = None
    sampling: dict[str, Scalar | tuple[str, ...]] = Field(default_factory=dict)


class Manifest(_Common):
    """One immutable release: everything it pins. Its digest is its identity."""

    format: Literal[1] = 1
    artifacts: tuple[Artifact, ...]
    code: Code | None
    environment: Environment
    data: tuple[Data, ...]
    contract: Contract
    behaviour: dict[str, Any] | None = None
    inference: Inference

    def content(self) -> dict[str, Any]:
        """The manifest as plain JSON values, in the form that the digest covers.

        What could not be said in the format's first days is left out where it is not said: the same
        content keeps its digest.
        """
        content = self.model_dump(mode="json")
        if not self.contract.operations:
            del content["contract"]["operations"]
        if self.serving.concurrency is None:
            del content["serving"]["concurrency"]
        if self.cost is not None and self.cost.per_call is None:
            del content["cost"]["per_call"]
        return content

    def digest(self) -> str:
        """`sha256:…` over all that the release pins."""
        return digest_of(self.content())

    def pinned_files(self) -> tuple[PinnedFile, ...]:
        """Every stored file that the release needs in order to start."""
        lock = (self.environment.lock,) if self.environment.lock else ()
        return tuple(file for artifact in self.artifacts for file in artifact.files) + lock

    def stored_files(self) -> tuple[PinnedFile, ...]:
        """Every file of the release that is in the blob store: the pinned ones and the samples."""
        samples = (file for data in self.data if data.role == "sample" for file in data.files)
        return self.pinned_files() + tuple(samples)
