"""What MLServer serves while conversations are recorded: numbers and texts, both ways."""
# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from typing import Any

import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.errors import InferenceError
from mlserver.types import InferenceRequest, InferenceResponse


class Tiny(MLModel):
    async def load(self) -> bool:
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        given = {one.name: one for one in payload.inputs}
        if set(given) != {"features", "names"}:
            raise InferenceError(f"expected features and names, got {sorted(given)}")
        features: Any = NumpyCodec.decode_input(given["features"])
        names = StringCodec.decode_input(given["names"])
        score = features.sum(axis=1).astype(np.float32)
        outputs = {
            "label": NumpyCodec.encode_output("label", (score > 0).astype(np.int64)),
            "score": NumpyCodec.encode_output("score", score),
            "greeting": StringCodec.encode_output("greeting", [f"Grüße, {name}" for name in names]),
        }
        asked = [one.name for one in payload.outputs or ()] or list(outputs)
        return InferenceResponse(
            model_name=self.name,
            model_version=self.version,
            id=payload.id,
            outputs=[outputs[name] for name in asked],
        )
