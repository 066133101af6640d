import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from shipworthy.domain.contract import Contract, Tensor
from shipworthy.domain.manifest import ArtifactSpec
from shipworthy.protocols import oip, oip_binary
from shipworthy.protocols.packed import Packed


@pytest.fixture
def served(serve, code_release):
    return serve(code_release(), "--timeout", "1", "--queue", "1")


def test_the_protocol_s_documents(serve, code_release, tools):
    made = code_release()
    served = serve(made)
    assert served.get("/v2")[1]["name"] == "shipworthy"
    assert served.get("/v2/health/live") == (200, {"live": True})
    assert served.get("/v2/models/tested/ready") == (200, {"name": "tested", "ready": True})
    status, metadata = served.get("/v2/models/tested/versions/3")
    assert status == 200
    assert metadata["versions"] == ["3"]
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP64", "shape": [-1, 1]}]
    assert metadata["parameters"]["release"] == "tested@3"
    assert metadata["parameters"]["digest"] == made.release.digest
    for path in ("/v2/models/other", "/v2/models/tested/versions/4", "/v3", "/v2/models/tested/x"):
        assert served.get(path)[0] == 404
    assert served.get("/v2/models/tested/infer")[0] == 405
    assert served.get("/v2", method="DELETE")[0] == 405

    status, answer = served.get(
        "/v2/models/tested/versions/3/infer", tools.code_request(2, 4) | {"id": "a1"}
    )
    assert status == 200
    assert answer == {
        "model_name": "tested",
        "model_version": "3",
        "id": "a1",
        "outputs": [
            {"name": "y", "datatype": "FP64", "shape": [2, 1], "data": [5.0, 10.0]},
            {"name": "who", "datatype": "BYTES", "shape": [2], "data": ["me", "me"]},
        ],
    }
    assert served.infer(2, outputs=["who"])[1]["outputs"][0]["data"] == ["me"]
    assert "loaded the factor" in served.log.read_text()


def infer_binary(served, body, length):
    request = urllib.request.Request(
        f"{served.url}/v2/models/tested/infer", body, {oip_binary.HEADER: str(length)}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        told = answer.headers[oip_binary.HEADER]
        return answer.headers["content-type"], answer.read(), told and int(told)


def test_tensors_come_and_go_in_binary(served):
    assert "binary_tensor_data" in served.get("/v2")[1]["extensions"]
    sent = [oip.TensorValues("x", "FP64", (2, 1), [2.0, 4.0])]
    for wanted in (False, True):
        body, length = oip_binary.encode_request(sent, id="a", binary_output=wanted)
        kind, answer, length = infer_binary(served, body, length)
        assert kind == ("application/octet-stream" if wanted else "application/json")
        response = oip_binary.decode_response(answer, length)
        assert (response.model_name, response.model_version, response.id) == ("tested", "3", "a")
        contract = Contract(outputs=(Tensor("y", "FP64", (-1, 1)), Tensor("who", "BYTES", (-1,))))
        y, who = oip.ContractChecker(contract).check_response(
            response, oip.InferenceRequest(inputs=[])
        )
        assert isinstance(y.data, Packed) is isinstance(who.data, Packed) is wanted
        values = [one.data.tolist() if wanted else one.data for one in (y, who)]
        assert values == [[5.0, 10.0], ["me", "me"]]


@pytest.mark.parametrize(
    ("length", "said"), [("x", "Inference-Header-Content-Length"), ("999", "of JSON are announced")]
)
def test_a_wrong_length_of_the_json_is_refused(served, length, said):
    with pytest.raises(urllib.error.HTTPError) as caught:
        infer_binary(served, b'{"inputs":[]}', length)
    with caught.value as answer:
        assert answer.code == 400
        assert said in json.loads(answer.read())["error"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "not JSON"),
        ({"inputs": []}, '"x" is missing'),
        ({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1]}]}, "FP64"),
        ({"inputs": [{"name": "x", "datatype": "FP64", "shape": [2, 1], "data": [1]}]}, "2 values"),
    ],
)
def test_requests_against_the_contract_never_reach_the_model(served, body, said):
    status, answer = served.get("/v2/models/tested/infer", body)
    assert status == 400
    assert said in answer["error"]


def test_what_the_model_does_wrong_is_its_own_failure(served, tools):
    for value, said in [
        (-1, "ValueError: negative is not for me"),
        (-5, "NaN"),
        (-6, "'y' came as FP32 [1, 1]; promised is FP64 [-1, 1]"),
        (-7, "must return a dict"),
    ]:
        status, answer = served.infer(value)
        assert status == 500
        assert said in answer["error"]
        assert "Traceback" not in answer["error"]
    assert "Traceback" in served.log.read_text()
    assert served.infer(2)[0] == 200


@pytest.mark.parametrize(
    ("value", "status", "said"),
    [(-2, 500, "exit code 7"), (-4, 500, "SIGABRT"), (-3, 504, "within 1 s")],
)
def test_a_model_that_takes_its_process_along_or_hangs(served, tools, value, status, said):
    hosts = tools.hosts_of(served.process.pid)
    got, answer = served.infer(value)
    assert got == status
    assert said in answer["error"]
    assert not any(tools.alive(host) for host in hosts)
    tools.wait_until(served.ready)
    assert served.infer(2)[0] == 200
    assert tools.hosts_of(served.process.pid) != hosts


def test_while_it_is_loaded_again_it_is_not_ready_and_says_so(served, tools):
    served.infer(-2)
    assert served.get("/v2/health/ready") == (503, {"ready": False})
    status, answer = served.infer(2)
    assert status == 503
    assert "loaded again" in answer["error"]


def test_a_full_queue_is_said_at_once(served, tools):
    served.infer(1)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: served.infer(-8)[0], range(6)))
    assert sorted(set(answers)) == [200, 503]
    assert answers.count(200) == 2


def test_workers_answer_side_by_side(serve, code_release, tools):
    served = serve(code_release(), "--workers", "2")
    tools.wait_until(lambda: served.log.read_text().count("loaded the factor") == 2)
    served.infer(-2)
    assert served.infer(2)[0] == 200


def test_a_body_has_a_limit(serve, code_release, tools):
    served = serve(code_release(), "--max-body", "200")
    assert served.infer(*[1.0] * 100)[0] == 413


def test_sigterm_lets_the_running_request_finish(served, tools):
    hosts = tools.hosts_of(served.process.pid)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answer = pool.submit(served.infer, -8)
        time.sleep(0.2)
        served.process.send_signal(signal.SIGTERM)
        assert answer.result()[0] == 200
    assert served.process.wait(10) == 0
    tools.wait_until(lambda: not any(map(tools.alive, hosts)))


def test_no_host_outlives_a_server_that_is_killed(served, tools):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answer = pool.submit(served.infer, -3)  # the host never comes back to look at its socket
        time.sleep(0.3)
        hosts = tools.hosts_of(served.process.pid)
        served.process.kill()
        assert isinstance(answer.exception(), OSError)
    assert hosts
    tools.wait_until(lambda: not any(map(tools.alive, hosts)))


def test_it_ends_when_its_stdin_does(serve, code_release):
    served = serve(code_release(), "--watch-stdin")
    served.process.stdin.close()
    served.process.stdin = None
    assert served.process.wait(10) == 0


def test_altered_bytes_are_never_loaded(serve, code_release, tools):
    made = code_release()
    (made.folder / "predictor.py").write_text("print('not what was registered')")
    served = serve(made, wait=False)
    assert served.process.wait(20) == 1
    problem = json.loads(served.ready_file.read_text())["problem"]
    assert "not the registered" in problem
    assert "not what was registered" not in served.log.read_text().replace(problem, "")


def test_a_model_that_does_not_load_is_told_in_one_sentence(serve, make_release, tmp_path):
    (tmp_path / "predictor.py").write_text("import nowhere_at_all")
    made = make_release(tmp_path, ArtifactSpec(path="predictor.py", format="python"))
    served = serve(made, wait=False)
    assert served.process.wait(20) == 3
    problem = json.loads(served.ready_file.read_text())["problem"]
    assert "nowhere_at_all" in problem
    assert "\n" not in problem


def test_a_port_that_is_taken(serve, code_release):
    made = code_release()
    first = serve(made)
    second = serve(made, "--port", first.url.rpartition(":")[2], wait=False)
    assert second.process.wait(20) == 3


def test_an_sklearn_model_and_its_probabilities(serve, make_release, models, tools):
    spec = ArtifactSpec(path="digits.skops", format="skops")
    served = serve(make_release(models, spec, contract=tools.DIGITS_CONTRACT))
    tensor = {"name": "input", "datatype": "FP64", "shape": [2, 64], "data": [[0.0] * 64] * 2}
    status, plain = served.get("/v2/models/tested/infer", {"inputs": [tensor]})
    assert status == 200
    assert [output["name"] for output in plain["outputs"]] == ["predict"]
    asked = {"inputs": [tensor], "outputs": [{"name": "predict_proba"}, {"name": "predict"}]}
    status, both = served.get("/v2/models/tested/infer", asked)
    assert [output["name"] for output in both["outputs"]] == ["predict_proba", "predict"]
    assert both["outputs"][0]["shape"] == [2, 10]
    assert sum(both["outputs"][0]["data"]) == pytest.approx(2.0)
    response = oip.decode_response(json.dumps(both).encode())
    request = oip.decode_request(json.dumps(asked).encode())
    oip.ContractChecker(tools.DIGITS_CONTRACT).check_response(response, request)


def test_without_release_or_folder_it_says_what_it_needs():
    run = subprocess.run(
        [sys.executable, "-m", "shipworthy.runtimes.model_server"],
        capture_output=True, text=True, check=False, env=dict(os.environ),
    )  # fmt: skip
    assert run.returncode == 2
    assert "--folder" in run.stderr
