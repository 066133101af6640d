"""What users of MLflow's scoring servers do, each with one request.

Run it where `requests` is installed: `python scoring_calls.py URL KEY`, where the address ends
with what stands before `/invocations`. It prints what the users get.
"""
# pyright: reportMissingImports=false, reportMissingModuleSource=false, reportPrivateImportUsage=false

import json
import sys
from collections.abc import Callable
from typing import Any

import requests

COLUMNS = ["age", "plan"]
ROWS = [[31.0, "pro"], [17.5, "frei – “x”"]]
RECORDS = [dict(zip(COLUMNS, row, strict=True)) for row in ROWS]


def calls(url: str, key: str) -> dict[str, Callable[[], Any]]:
    session = requests.Session()
    session.headers["Authorization"] = f"Bearer {key}"

    def post(**said: Any) -> Any:
        return session.post(f"{url}/invocations", timeout=60, **said)

    csv = "age,plan\n31.0,pro\n17.5,frei\n"
    kind = {"Content-Type": "text/csv"}
    return {
        "split": lambda: post(json={"dataframe_split": {"columns": COLUMNS, "data": ROWS}}),
        "records": lambda: post(json={"dataframe_records": RECORDS}),
        "inputs": lambda: post(json={"inputs": {"age": [31.0], "plan": ["pro"]}}),
        "instances": lambda: post(json={"instances": RECORDS}),
        "csv": lambda: post(data=csv.encode(), headers=kind),
        "wrong_column": lambda: post(json={"dataframe_records": [{"nonsense": 1}]}),
        "not_json": lambda: post(data=b"{", headers={"Content-Type": "application/json"}),
    }


def outcome(call: Callable[[], Any]) -> dict[str, Any]:
    answer = call()
    return {"status": answer.status_code, "answer": answer.json()}


def main() -> None:
    url, key = sys.argv[1:]
    results = {name: outcome(call) for name, call in calls(url, key).items()}
    json.dump({"client": f"requests {requests.__version__}", "results": results}, sys.stdout)


if __name__ == "__main__":
    main()
