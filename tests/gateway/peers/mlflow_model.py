"""Write the model that MLflow serves while conversations are recorded: `mlflow_model.py FOLDER`."""
# pyright: reportMissingImports=false, reportUntypedBaseClass=false

import sys

import mlflow.pyfunc
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, Schema


class Tiny(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):  # no hints: MLflow would read them
        del context, params
        return pd.DataFrame({"risk": model_input["age"] / 100, "why": "is " + model_input["plan"]})


if __name__ == "__main__":
    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.double, "age"), ColSpec(DataType.string, "plan")])
    )
    mlflow.pyfunc.save_model(sys.argv[1], python_model=Tiny(), signature=signature)
