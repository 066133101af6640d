"""The process that holds a model: loads it and answers over a private socket.

Run as `python -I model_host.py FD SPEC` by the release's own interpreter, so this file uses the
standard library, numpy and what the model needs, and nothing of Shipworthy. Python 3.10 or newer.
A model that crashes, hangs or leaks takes this process with it and never the HTTP server before it.

`SPEC` is JSON: `{"folder", "path", "format", "entry", "unsafe"}`, the folder absolute, the rest as
the manifest has it. `-I` keeps PYTHONPATH and the user's own packages out: what is not pinned is
not seen. The model's folder comes first on `sys.path`; the release's is the working directory.

Frames, both ways: `<II>` sizes of header and body, then the header (JSON), then the body. Tensors
are `{"name", "datatype", "shape", "size"}` in the header and little-endian values in the body, one
after the other; BYTES elements have a 32-bit length before each. The first frame comes from here:
`{"ok": true, "engine", "engine_version"}` once the model is loaded, or `{"problem"}` with
one sentence. Then each request gets one answer:

    {"op": "predict", "inputs": [tensor…], "outputs": [name…] | null}  →  {"ok", "outputs"}
    {"op": "describe"}  →  {"ok"} and what the model takes and returns, as far as it tells

or `{"error": {"type", "message"}}` for what the model raised, whose traceback goes to stderr.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
import json
import os
import select
import signal
import socket
import struct
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[Any]
    Tensors = dict[str, Array]
else:
    try:
        import numpy as np
    except ImportError:  # said by load(), as one clear sentence
        np = None

Spec = dict[str, Any]

DTYPES = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8",
    "INT8": "i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8",
    "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
"""numpy's name of each Open Inference Protocol type but BYTES."""

SKLEARN_MODULES = frozenset({
    "sklearn._loss.link", "sklearn._loss.loss", "sklearn.calibration",
    "sklearn.cluster._bisect_k_means", "sklearn.cluster._kmeans",
    "sklearn.ensemble._hist_gradient_boosting.predictor",
    "sklearn.feature_selection._univariate_selection",
    "sklearn.gaussian_process._gpc", "sklearn.gaussian_process.kernels",
    "sklearn.metrics._dist_metrics", "sklearn.neighbors._ball_tree", "sklearn.neighbors._kd_tree",
    "sklearn.neural_network._stochastic_optimizers", "sklearn.tree._tree",
})  # fmt: skip
"""Modules of scikit-learn whose types skops leaves for its user to judge (it trusts only public
estimators), though every forest needs them. They hold numbers, call nothing that the file names,
and a malformed one can at worst crash this process."""

PLAIN_TYPES = frozenset({
    "numpy.dtype", "numpy.mean",
    "scipy.interpolate._bsplines.BSpline", "scipy.sparse._csr.csr_matrix",
})  # fmt: skip


class Problem(Exception):
    """One sentence for the person who made the release: what is wrong; and the cure."""


# --- frames -------------------------------------------------------------------------------------


def receive(connection: socket.socket) -> tuple[dict[str, Any], memoryview] | None:
    """The next frame's header and body; None when the other side has gone."""
    sizes = _exactly(connection, 8)
    if sizes is None:
        return None
    header_size, body_size = struct.unpack("<II", sizes)
    content = _exactly(connection, header_size + body_size)
    if content is None:
        return None
    return json.loads(bytes(content[:header_size])), content[header_size:]


def _exactly(connection: socket.socket, size: int) -> memoryview | None:
    buffer = memoryview(bytearray(size))
    done = 0
    while done < size:
        count = connection.recv_into(buffer[done:])
        if not count:
            return None
        done += count
    return buffer


def send(connection: socket.socket, header: dict[str, Any], body: bytes = b"") -> None:
    """Write one frame."""
    text = json.dumps(header).encode()
    connection.sendall(struct.pack("<II", len(text), len(body)) + text + body)


def unpack(described: Iterable[dict[str, Any]], body: memoryview) -> Tensors:
    """The frame's tensors as arrays; BYTES as an object array of str."""
    tensors: Tensors = {}
    offset = 0
    for tensor in described:
        raw = body[offset : offset + tensor["size"]]
        offset += tensor["size"]
        if tensor["datatype"] == "BYTES":
            flat = np.array([*_strings(raw), None], dtype=object)[:-1]  # None: never a matrix
        else:
            flat = np.frombuffer(raw, dtype=DTYPES[tensor["datatype"]])
        tensors[tensor["name"]] = flat.reshape(tensor["shape"])
    return tensors


def _strings(raw: memoryview) -> Iterable[str]:
    offset = 0
    while offset < len(raw):
        (size,) = struct.unpack_from("<I", raw, offset)
        offset += 4 + size
        yield str(raw[offset - size : offset], "utf-8")


def pack(tensors: Tensors) -> tuple[list[dict[str, Any]], bytes]:
    """Arrays as a frame's tensors and body; TypeError for what the protocol can't say."""
    described: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for name, array in tensors.items():
        datatype = datatype_of(name, array)
        if datatype == "BYTES":
            texts = [_text(value) for value in array.ravel().tolist()]
            raw = b"".join(struct.pack("<I", len(text)) + text for text in texts)
        else:
            raw = array.astype(DTYPES[datatype], copy=False).tobytes()
        parts.append(raw)
        shape = list(array.shape)
        described.append({"name": name, "datatype": datatype, "shape": shape, "size": len(raw)})
    return described, b"".join(parts)


def _text(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def datatype_of(name: str, array: Array) -> str:
    """The protocol's type of an array; TypeError when it has none."""
    kind = array.dtype.kind
    if kind in "OUST":
        return "BYTES"
    datatype = _DATATYPES.get(array.dtype.str.lstrip("<>=|").replace("b1", "?"))
    if datatype is None:
        raise TypeError(f"{name!r} holds {array.dtype}, which the protocol has no type for")
    if kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name!r} holds NaN or infinity, which JSON can't carry")
    return datatype


_DATATYPES = {code.lstrip("<"): name for name, code in DTYPES.items()}


# --- engines ------------------------------------------------------------------------------------


class Engine:
    """A loaded model."""

    name = ""
    version = ""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def describe(self) -> dict[str, Any]:
        """What it takes and returns, as far as the model tells without sample rows.

        `takes` is `{"columns", "texts", "chooses"}` for one tensor a column, of which `texts` are
        known to be text and `chooses` says that others may be; `{"features": n}` for one matrix, or
        a list of texts when n is null; `{"tensors": […]}` for declared inputs; or `{}`.
        """
        return {"takes": {}, "side_effects": "none"}

    def predict(self, inputs: Tensors, wanted: Sequence[str] | None) -> Tensors:
        """The outputs that are wanted; None: all that are not optional."""
        raise NotImplementedError


def _array(values: Any) -> Array:
    return np.asarray(values.toarray() if hasattr(values, "toarray") else values)


class SklearnEngine(Engine):
    """An estimator with `predict`: scikit-learn's own, or any with its habits.

    Fitted on a DataFrame it takes one tensor a column, else one tensor `input`: FP64
    [-1, features], or BYTES [-1] when it was fitted on a list of texts.
    """

    name = "sklearn"

    def __init__(self, estimator: Any, path: str) -> None:
        super().__init__()
        if not callable(getattr(estimator, "predict", None)):
            raise Problem(
                f"{path} holds a {type(estimator).__name__}, which has no predict();"
                " save a fitted model or pipeline"
            )
        self.version = _version("scikit-learn")
        self._estimator = estimator
        names = getattr(estimator, "feature_names_in_", None)
        self.columns = None if names is None else [str(name) for name in names]
        self._features: int | None = getattr(estimator, "n_features_in_", None)
        self._pandas: Any = None
        if self.columns is not None:
            self._pandas = _needed("pandas", f"{path} was fitted on a table with named columns and")
        self._classes: list[Any] | None = None
        classes = getattr(estimator, "classes_", None)
        if getattr(classes, "dtype", None) is not None:  # a list of arrays when multi-output
            self._classes = cast("Any", classes).tolist()

    def describe(self) -> dict[str, Any]:  # noqa: D102  # as declared above
        if self.columns is None:
            takes: dict[str, Any] = {"features": self._features}
        else:
            takes = {
                "columns": self.columns,
                "texts": sorted(_text_columns(self._estimator)),
                "chooses": _chooses_columns(self._estimator),
            }
        proba = self._classes is not None and hasattr(self._estimator, "predict_proba")
        return {
            "takes": takes,
            "side_effects": "none",
            "optional": ["predict_proba"] if proba else [],
            "classes": self._classes,
        }

    def predict(self, inputs: Tensors, wanted: Sequence[str] | None) -> Tensors:  # noqa: D102
        table: Any = self._table(inputs)
        names = ["predict"] if wanted is None else wanted
        return {name: _array(getattr(self._estimator, name)(table)) for name in names}

    def _table(self, inputs: Tensors) -> Any:
        if "input" in inputs and self.columns != ["input"]:
            matrix = inputs["input"]
            if self.columns is None:
                return matrix
            return self._pandas.DataFrame(matrix, columns=self.columns)
        flat = {name: inputs[name].reshape(-1) for name in self.columns or inputs}
        return self._pandas.DataFrame(flat)


def _parts(estimator: Any) -> list[Any]:
    """The estimator and all that it is built of."""
    found = [estimator]
    if hasattr(estimator, "get_params"):
        found += list(estimator.get_params(deep=True).values())
    best = getattr(estimator, "best_estimator_", None)
    return found + (_parts(best) if best is not None else [])


def _chooses_columns(estimator: Any) -> bool:
    return any(
        hasattr(part, "transformers") or hasattr(part, "categories_") for part in _parts(estimator)
    )


def _text_columns(estimator: Any) -> set[str]:
    """Columns whose fitted categories are texts, so that a post code `01234` stays one."""
    chosen: set[str] = set()
    for part in _parts(estimator):
        for _, transformer, columns in getattr(part, "transformers_", ()):
            for step in _parts(transformer):
                categories: Any = getattr(step, "categories_", ())
                if hasattr(columns, "__len__") and len(categories) == len(columns):
                    chosen |= {
                        str(column)
                        for column, known in zip(columns, categories, strict=True)
                        if isinstance(known.tolist()[0], str)
                    }
    return chosen


class OnnxEngine(Engine):
    """An ONNX graph; its inputs and outputs have the graph's own names and types."""

    name = "onnx"

    def __init__(self, path: Path) -> None:
        super().__init__()
        runtime = _needed("onnxruntime", f"{path.name} is an ONNX graph and", extra="onnx")
        self.version = str(runtime.__version__)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS") or 1)
        options.inter_op_num_threads = 1
        available = runtime.get_available_providers()
        wished = ("CUDAExecutionProvider", "CPUExecutionProvider")
        providers = [provider for provider in wished if provider in available]
        self._session = runtime.InferenceSession(str(path), options, providers=providers)
        self._inputs = {node.name: _onnx_tensor(node) for node in self._session.get_inputs()}
        self._outputs = {node.name: _onnx_tensor(node) for node in self._session.get_outputs()}

    def describe(self) -> dict[str, Any]:  # noqa: D102  # as declared above
        return {
            "takes": {"tensors": list(self._inputs.values())},
            "outputs": list(self._outputs.values()),
            "side_effects": "none",
        }

    def predict(self, inputs: Tensors, wanted: Sequence[str] | None) -> Tensors:  # noqa: D102
        names = list(wanted) if wanted is not None else list(self._outputs)
        answers = self._session.run(names, inputs)
        return {name: _from_onnx(answer) for name, answer in zip(names, answers, strict=True)}


_ONNX_TYPES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64",
    "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
    "float16": "FP16", "float": "FP32", "double": "FP64", "string": "BYTES",
}  # fmt: skip


def _onnx_tensor(node: Any) -> dict[str, Any]:
    """A graph's input or output as a contract's tensor.

    A list of maps from class to probability, which converters write for classifiers by default,
    is served as a matrix with one column a class, in the order of the classes.
    """
    kind = str(node.type)
    if kind.startswith("seq(map("):
        return {"name": node.name, "datatype": "FP32", "shape": [-1, -1]}
    datatype = _ONNX_TYPES.get(kind.removeprefix("tensor(").removesuffix(")"))
    if datatype is None:
        raise Problem(
            f"the graph's {node.name!r} is of type {kind}, which can't be sent;"
            " export the model with plain tensors"
        )
    shape = [size if isinstance(size, int) and size > 0 else -1 for size in node.shape]
    return {"name": node.name, "datatype": datatype, "shape": shape}


def _from_onnx(answer: Any) -> Array:
    if isinstance(answer, list):
        rows = cast("list[dict[Any, float]]", answer)
        return np.array([[row[key] for key in sorted(row)] for row in rows], dtype="<f4")
    return np.asarray(answer)


class PythonEngine(Engine):
    """A Python function: `predict(inputs: dict[str, ndarray]) -> dict[str, ndarray]`.

    `entry` names it, as `function` of the artifact's file or as `module:function` of a module
    beside it. A function `load()` in the same module, if there is one, is called once before. Texts
    come and go as object arrays of str.
    """

    name = "python"

    def __init__(self, path: Path, entry: str | None) -> None:
        super().__init__()
        self.version = ".".join(map(str, sys.version_info[:3]))
        module_name, _, function = (entry or "predict").rpartition(":")
        module = importlib.import_module(module_name) if module_name else _module_at(path)
        found = getattr(module, function, None)
        if not callable(found):
            raise Problem(
                f"{path.name} has no function {function}(inputs);"
                " define it, or name yours in `entry`"
            )
        load = getattr(module, "load", None)
        if callable(load):
            load()
        self._function: Callable[[Tensors], Any] = found

    def describe(self) -> dict[str, Any]:  # noqa: D102  # as declared above
        return {"takes": {}, "side_effects": "unknown"}

    def predict(self, inputs: Tensors, wanted: Sequence[str] | None) -> Tensors:  # noqa: D102
        outputs: dict[str, Any] = self._function(inputs)
        if type(outputs) is not dict or not outputs:
            raise TypeError(f"predict() returned {type(outputs)}; it must return a dict of arrays")
        names = outputs if wanted is None else wanted
        return {name: _array(outputs[name]) for name in names}


def _module_at(path: Path) -> Any:
    file = path / "predictor.py" if path.is_dir() else path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise Problem(f"{file.name} is not a Python file; name one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # so that what it pickles or imports in a circle finds it
    spec.loader.exec_module(module)
    return module


# --- loading ------------------------------------------------------------------------------------


def load(spec: Spec) -> Engine:
    """The model that the spec names; Problem when it does not load."""
    path = Path(spec["folder"], spec["path"])
    if importlib.util.find_spec("numpy") is None:
        raise Problem("the release's interpreter has no numpy; add it to environment.lock")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            engine = _load(spec, path)
        except Problem:
            raise
        except Exception as error:
            traceback.print_exc()
            raise Problem(_load_problem(error, spec, _saved_with(caught))) from error
    if saved := _saved_with(caught):
        engine.notes.append(
            f"it was saved with scikit-learn {saved} and is loaded with {engine.version}:"
            f" pin scikit-learn=={saved} in environment.lock for the same predictions"
        )
    return engine


def _load(spec: Spec, path: Path) -> Engine:
    kind = spec["format"]
    if kind == "onnx":
        return OnnxEngine(path)
    if kind == "python":
        return PythonEngine(path, spec.get("entry"))
    if kind == "skops":
        return SklearnEngine(_from_skops(path, spec.get("unsafe")), path.name)
    if kind not in ("joblib", "pickle"):
        raise Problem(f"{path.name} is no model; give its format: skops, onnx, python or joblib")
    if not spec.get("unsafe"):
        raise Problem(
            f"{path.name} is a pickle and runs code when loaded; save it with skops.io.dump,"
            " or state in `unsafe` why it is trusted"
        )
    if kind == "joblib":
        return SklearnEngine(_needed("joblib", f"{path.name}").load(path), path.name)
    pickle = importlib.import_module("pickle")
    with path.open("rb") as file:
        return SklearnEngine(pickle.load(file), path.name)


def _from_skops(path: Path, unsafe: str | None) -> Any:
    skops = _needed("skops.io", f"{path.name}")
    untrusted = [str(name) for name in skops.get_untrusted_types(file=path)]
    strange = [name for name in untrusted if not _is_plain(name) and name not in (unsafe or "")]
    if strange:
        raise Problem(
            f"{path.name} holds types that skops does not trust ({', '.join(strange)});"
            " if they are yours, name each one in `unsafe` and say why"
        )
    return skops.load(path, trusted=untrusted)


def _is_plain(name: str) -> bool:
    return name in PLAIN_TYPES or name.rpartition(".")[0] in SKLEARN_MODULES


def _saved_with(caught: Iterable[warnings.WarningMessage]) -> str | None:
    for warning in caught:
        version = getattr(warning.message, "original_sklearn_version", None)
        if version:
            return str(version)
    return None


def _load_problem(error: Exception, spec: Spec, saved: str | None) -> str:
    path = spec["path"]
    detail = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    if isinstance(error, ModuleNotFoundError):
        return (
            f"{path} needs the module {error.name!r}, which the release's interpreter does not"
            " have; add it to environment.lock, or the file to artifacts"
        )
    if "__main__" in str(error):
        return (
            f"{path} needs a class or function of the script that saved it ({detail});"
            " move it into a module and list that file among the artifacts"
        )
    if saved is not None:
        return (
            f"{path} was saved with scikit-learn {saved} and does not load with"
            f" {_version('scikit-learn')} ({detail}); pin that version in environment.lock"
        )
    if spec["format"] == "python":
        return f"{path} does not load ({detail}); run it with python to see where"
    return f"{path} can't be read as {spec['format']} ({detail}); check the file and its format"


def _needed(module: str, what: str, extra: str | None = None) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0]
        ours = (
            f", or pip install 'shipworthy[{extra or package}]'"
            if extra or package == "pandas"
            else ""
        )
        raise Problem(
            f"{what} needs {package}, which the interpreter does not have;"
            f" add it to environment.lock{ours}"
        ) from None


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


# --- the process --------------------------------------------------------------------------------


def answer(
    engine: Engine, request: dict[str, Any], body: memoryview
) -> tuple[dict[str, Any], bytes]:
    """The header and body that answer a request."""
    if request["op"] == "describe":
        return {"ok": True, "notes": engine.notes, **engine.describe()}, b""
    outputs = engine.predict(unpack(request["inputs"], body), request["outputs"])
    described, content = pack(outputs)
    return {"ok": True, "outputs": described}, content


def _serve(connection: socket.socket, engine: Engine) -> None:
    while (frame := receive(connection)) is not None:
        request, body = frame
        try:
            header, content = answer(engine, request, body)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever the model raises
            traceback.print_exc()
            header, content = {"error": {"type": type(error).__name__, "message": str(error)}}, b""
        send(connection, header, content)


def _end_with(connection: socket.socket) -> None:
    """End this process and all it started when the server has gone, also amid a long predict."""
    if sys.platform == "linux":  # at once, also when the model never lets this thread run
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    hangup = select.POLLHUP | getattr(select, "POLLRDHUP", 0)

    def watch() -> None:
        poll = select.poll()
        poll.register(connection, hangup)
        poll.poll()
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: Sequence[str]) -> int:
    """Load the model and answer until the other side goes away."""
    connection = socket.socket(fileno=int(arguments[0]))
    connection.set_inheritable(False)
    _end_with(connection)
    spec: Spec = json.loads(arguments[1])
    folder = Path(spec["folder"])
    sys.path.insert(0, str(folder))
    model = folder / spec["path"]
    sys.path.insert(0, str(model if model.is_dir() else model.parent))
    os.chdir(folder)
    try:
        engine = load(spec)
    except Problem as problem:
        send(connection, {"problem": str(problem)})
        return 1
    send(connection, {"ok": True, "engine": engine.name, "engine_version": engine.version})
    _serve(connection, engine)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
