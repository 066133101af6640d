"""What the releases behind recorded and live clients declare, and the patience with them."""

from shipworthy.domain.contract import Contract, Tensor
from shipworthy.domain.plan import Deadlines

PATIENT = Deadlines(connect=10.0, attempt=30.0, total=60.0)
LANGUAGE = Contract(protocol="openai", side_effects="none")
TENSORS = Contract(
    inputs=(Tensor("features", "FP64", (-1, 4)), Tensor("names", "BYTES", (-1, 1))),
    outputs=(
        Tensor("label", "INT64", (-1, 1), optional=True),
        Tensor("score", "FP32", (-1, 1), optional=True),
        Tensor("greeting", "BYTES", (-1, 1), optional=True),
    ),
    side_effects="none",
)
SCORING = Contract(
    protocol="mlflow",
    inputs=(Tensor("age", "FP64", (-1,)), Tensor("plan", "BYTES", (-1,))),
    outputs=(Tensor("risk", "FP64", (-1,)), Tensor("why", "BYTES", (-1,))),
    side_effects="none",
)
