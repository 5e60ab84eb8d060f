"""The endpoint as its users meet it: a server of its own on the loopback, and predict_scan.sh."""

import base64
import hashlib
import html
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pydicom.data
import pytest
from conftest import ROOT, make_dicom
from PIL import Image

import cli
import endpoint
import predict
from model import PneumoniaUNET, save_checkpoint

PYDICOM = Path(pydicom.data.__file__).parent
SCAN = ROOT / "predict_scan.sh"
JSON = {"Content-Type": "application/json"}
linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


class Server:
    """A server in a process group of its own, in an empty folder, with an empty TMPDIR."""

    def __init__(self, checkpoint, folder):
        self.folder = folder
        self.log = open(folder.with_name("endpoint.log"), "w+")
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "endpoint.py", "--port", "0"], cwd=folder, text=True,
            stdout=subprocess.PIPE, stderr=self.log, start_new_session=True,
            env=os.environ | {"MODEL_CHECKPOINT": str(checkpoint), "TMPDIR": str(folder)})
        self.url = re.search(r"http://127.0.0.1:\d+", self.process.stdout.readline())[0]

    def call(self, method, path, body=None, headers=None):
        """Status, decoded JSON and headers of a response."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, json.load(response), response.headers
        finally:
            connection.close()

    def predict(self, patient_id, content):
        text = base64.b64encode(content).decode()
        body = json.dumps({"pId": patient_id, "dicom": text})
        return self.call("POST", "/predict", body, JSON)[:2]

    def upload(self, name, content):
        body = (f'--b\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
                .encode() + content + b"\r\n--b--\r\n")
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        return self.call("POST", "/predict", body, headers)[:2]

    def readers(self):
        threads = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(pid) for thread in threads for pid in thread.read_text().split()]

    def stop(self, number=signal.SIGTERM):
        """Exit status, and what the log holds."""
        self.process.send_signal(number)
        status = self.process.wait(20)
        self.process.stdout.close()
        self.log.seek(0)
        with self.log:
            return status, self.log.read()


@pytest.fixture(scope="module")
def radiograph(tmp_path_factory):
    """The bytes of a small DICOM file."""
    path = tmp_path_factory.mktemp("radiograph") / "a.dcm"
    pixels = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    make_dicom(pixels).save_as(path, enforce_file_format=True)
    return path.read_bytes()


def assert_refused(response, status, reason):
    assert response[0] == status
    assert reason in response[1]["detail"] and "\n" not in response[1]["detail"]


# Answers


def test_answers_equal_those_of_predict_for_every_file_that_ships_with_pydicom(
        server, checkpoint, tmp_path):
    folder, output = tmp_path / "files", tmp_path / "output"
    folder.mkdir()
    for number, path in enumerate(sorted(PYDICOM.rglob("*"))):
        if path.is_file():  # stems collide, so they get numbers
            shutil.copy(path, folder / f"{number}_{path.name}")
    predict.main(["--data", str(folder), "--model", str(checkpoint), "--output", str(output),
                  "--batch-size", "1"])
    annotations = json.loads((output / "annotations.json").read_text("utf-8"))
    report = (output / "report.html").read_text("utf-8")
    answered = 0
    for path in sorted(folder.iterdir()):
        status, answer = server.upload(path.name, path.read_bytes())
        if status == 200:
            [(patient_id, answer)] = answer.items()
            picture = (output / "images" / f"{patient_id}.png").read_bytes()
            remarks = answer.pop("remarks")
            assert answer == {"annotations": annotations.pop(patient_id),
                              "image": base64.b64encode(picture).decode()}, path.name
            assert html.escape(remarks) in report, path.name
            answered += 1
        else:
            assert f"{path},{answer['detail']}" in (output / "skipped.csv").read_text(
                "utf-8").replace('"', ""), path.name
    assert not annotations and answered > 40  # others are CT slices or no images
    print(f"{answered} answered")


def test_get_prediction_answers_as_the_server_does(server, checkpoint, radiograph, monkeypatch):
    monkeypatch.setenv("MODEL_CHECKPOINT", str(checkpoint))
    answer = endpoint.get_prediction("a", base64.b64encode(radiograph).decode())
    endpoint.load_network().readers.stop()
    endpoint.load_network.cache_clear()
    assert answer["a"]["annotations"] and (200, answer) == server.predict("a", radiograph)


def test_get_prediction_raises_value_error_with_the_reason(checkpoint, monkeypatch):
    monkeypatch.setenv("MODEL_CHECKPOINT", str(checkpoint))
    with pytest.raises(ValueError, match="^is not a DICOM file$"):
        endpoint.get_prediction("a", "bm90IGEgcmFkaW9ncmFwaA==")
    endpoint.load_network().readers.stop()
    endpoint.load_network.cache_clear()


def test_an_import_starts_nothing():
    code = ("import endpoint, multiprocessing, threading\n"
            "assert not multiprocessing.active_children() and threading.active_count() == 1\n"
            "assert not endpoint.load_network.cache_info().currsize")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_an_upload_of_a_form_is_named_by_its_file(server, radiograph):
    status, answer = server.upload("1.2.840.dcm", radiograph)
    assert status == 200 and list(answer) == ["1.2.840"]


@pytest.mark.parametrize("encode", [
    base64.encodebytes, lambda content: base64.urlsafe_b64encode(content).rstrip(b"="),
    lambda content: b"data:application/dicom;base64," + base64.b64encode(content)])
def test_base64_in_lines_for_addresses_or_from_a_browser_is_read(server, radiograph, encode):
    content = radiograph + b"\xfb\xff" * 40  # that + and / occur
    body = json.dumps({"pId": "a", "dicom": encode(content).decode()})
    assert server.call("POST", "/predict", body, JSON)[:2] == server.predict("a", content)


def test_health_answers_with_the_version_and_the_model(server, checkpoint):
    answer = {"status": "ok", "version": cli.VERSION, "model": str(checkpoint)}
    assert server.call("GET", "/health")[:2] == (200, answer)


def test_without_a_model_the_endpoint_takes_the_shipped_one(
        checkpoint, radiograph, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "SHIPPED", checkpoint)
    for variable in ("MODEL_CHECKPOINT", "TRAINML_MODEL_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    endpoint.load_network.cache_clear()
    answer = endpoint.get_prediction("a", base64.b64encode(radiograph).decode())
    assert answer["a"]["annotations"]
    assert endpoint.load_network().name == "the shipped model (docs/model-card.md)"
    endpoint.load_network().readers.stop()
    endpoint.load_network.cache_clear()


@pytest.mark.parametrize("path", ["/", "/health"])
def test_a_monitor_may_ask_for_the_head_alone(server, path):
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    connection.request("HEAD", path)
    assert connection.getresponse().status == 200
    connection.close()


def test_remarks_are_answered(server, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    _, answer = server.upload("a.png", (tmp_path / "a.png").read_bytes())
    assert answer["a"]["remarks"].startswith("is a colour image")


def test_a_network_without_finite_values_is_an_error_of_the_server(tmp_path, radiograph):
    model = PneumoniaUNET(patch_size=2)
    next(model.parameters()).data.view(-1)[0] = np.nan
    save_checkpoint(tmp_path / "nan.pth.tar", model, rescale_factor=16)
    (tmp_path / "empty").mkdir()
    server = Server(tmp_path / "nan.pth.tar", tmp_path / "empty")
    response = server.predict("a", radiograph)
    server.stop()
    assert_refused(response, 500, "nan.pth.tar gives values that are not finite")
    assert "--precision fp32" in response[1]["detail"]


# Refusals


@pytest.mark.parametrize("patient_id", [
    "", " a", "../a", "a/b", "a\\b", "..", ".hidden", "<b>a", "a\nb", "a\0b",
    "a\u202eb", "a\ud800", "x" * 129])
def test_ids_that_are_markup_paths_or_control_characters_are_refused(
        server, radiograph, patient_id):
    assert_refused(server.predict(patient_id, radiograph), 400, "has an id that is not")


def test_ids_of_any_script_are_taken(server, radiograph):
    for patient_id in ("O'Brien 7", "M\u00fcller & S\u00f6hne", 'a "b"', "Jo\u0308rg",
                       "\u60a3\u8005 1", "x" * 128):
        status, answer = server.predict(patient_id, radiograph)
        assert status == 200 and list(answer) == [patient_id]


@pytest.mark.parametrize("name", ["a %22b%22 & c.dcm", r'a \"b\" & c.dcm'])
def test_quotation_marks_in_the_name_of_an_upload_are_kept(server, radiograph, name):
    _, answer = server.upload(name, radiograph)
    assert list(answer) == ['a "b" & c']


def test_a_file_name_with_folders_is_refused(server, radiograph):
    assert_refused(server.upload("../../etc/a.dcm", radiograph), 400, "has an id that is not")


@pytest.mark.parametrize("body", [
    b"", b"null", b"[]", b"{", b"7", b'"pId"', b"[" * 100_000, b'{"pId": "a"}',
    b'{"pId": 7, "dicom": ""}', b'{"pId": "a", "dicom": 7}', b'{"pId": "a", "dicom": "%"}',
    b'{"pId": "a", "dicom": "AAAAA"}', '{"pId": "a", "dicom": "\u00e9"}'.encode(), b"\xff\xfe\x00",
    b'{"pId": "a", "pId": "b", "dicom": ""}', b'{"pId": "a", "dicom": "", "more": 1}'])
def test_json_that_is_not_an_id_and_base64_is_refused(server, body):
    response = server.call("POST", "/predict", body, JSON)
    assert_refused(response, 400, 'is not {"pId": "...", "dicom": "base64 text"}')


@pytest.mark.parametrize("body", [
    b"", b"--b--\r\n",
    b'--b\r\nContent-Disposition: form-data; name="pId"\r\n\r\na\r\n--b--\r\n',
    b'--b\r\nContent-Disposition: form-data; name="f"; filename="a"\r\n\r\ntruncated',
    b'--b\r\nContent-Disposition: form-data; name="f"; filename="a"\r\n\r\n1\r\n' * 2
    + b"--b--\r\n"])
def test_a_form_without_exactly_one_file_is_refused(server, body):
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    response = server.call("POST", "/predict", body, headers)
    assert_refused(response, 400, "is not a form with one file")


def test_a_form_without_boundary_is_refused(server):
    response = server.call("POST", "/predict", b"x", {"Content-Type": "multipart/form-data"})
    assert_refused(response, 400, "is not a form with one file")


def test_another_content_type_is_refused(server):
    response = server.call("POST", "/predict", b"x", {"Content-Type": "text/plain"})
    assert_refused(response, 415, "is neither application/json nor multipart/form-data")


@pytest.mark.parametrize("length", ["told", "chunked"])
def test_a_body_that_is_too_large_is_refused(server, length):
    body = bytes(endpoint.MAX_BODY + 1)
    if length == "chunked":
        body = iter([body[:2**20]] * 49)
    response = server.call("POST", "/predict", body, JSON)
    assert_refused(response, 413, "is larger than 50,331,648 bytes")


def test_a_bomb_is_refused(server, radiograph, tmp_path, write_dicom):
    few = np.zeros((8, 8), np.uint8)
    path = write_dicom(tmp_path / "bomb.dcm", few, Rows=65535, Columns=65535)
    response = server.upload("bomb.dcm", path.read_bytes())
    assert_refused(response, 400, "declares 65535 x 65535 pixels")
    bomb = b"[" + b"{}," * (endpoint.MAX_BODY // 3 - 2) + b"{}]"  # gigabytes of dictionaries
    assert_refused(server.call("POST", "/predict", bomb, JSON), 400, "")
    assert server.predict("a", radiograph)[0] == 200


def test_no_other_origin_is_let_in(server, radiograph):
    headers = {**JSON, "Origin": "http://elsewhere.example"}
    assert not [name for _, _, got in [server.call("POST", "/predict", b"{}", headers)]
                for name in got if name.lower().startswith("access-control")]
    assert server.call("OPTIONS", "/predict", None, headers)[0] == 405


def until(status, call):
    """The first response with this status to `call`, or the last of 100."""
    for _ in range(100):
        response = call()
        if response[0] == status:
            break
        time.sleep(0.1)
    return response


def test_beyond_so_many_requests_at_once_clients_are_sent_away(server, radiograph):
    host, port = server.url.removeprefix("http://").split(":")
    start = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n" \
            b"Content-Length: 9\r\n\r\n"
    waiting = [socket.create_connection((host, int(port))) for _ in range(endpoint.MAX_REQUESTS)]
    for connection in waiting:
        connection.sendall(start)
    status, answer, headers = until(503, lambda: server.call("POST", "/predict", b"{}", JSON))
    for connection in waiting:
        connection.close()
    assert (status, headers["Retry-After"]) == (503, "1") and answer["detail"]
    assert until(200, lambda: server.predict("a", radiograph))[0] == 200


def test_a_client_that_goes_away_leaves_no_traceback(server, radiograph):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n"
                           b"Content-Type: application/json\r\n\r\n{")
        time.sleep(0.2)
    assert server.predict("a", radiograph)[0] == 200
    assert not Path(server.log.name).read_text()


def hostile_bodies(radiograph, count):
    """Bodies with their headers: damaged files, damaged JSON, damaged forms, noise."""
    rng = random.Random(7)

    def damage(content):
        content = bytearray(content)
        for _ in range(rng.choice([1, 4, 64])):
            content[rng.randrange(len(content))] = rng.randrange(256)
        return bytes(content[:rng.choice([len(content), rng.randrange(len(content))])])

    form = {"Content-Type": "multipart/form-data; boundary=b"}
    frame = (b'--b\r\nContent-Disposition: form-data; name="f"; filename="a.dcm"\r\n\r\n'
             b"%b\r\n--b--\r\n")
    text = base64.b64encode(radiograph).decode()
    request = json.dumps({"pId": "a", "dicom": text}).encode()
    for number in range(count):
        yield [
            (JSON, damage(request)), (form, damage(frame % radiograph)),
            (form, frame % damage(radiograph)), (JSON, rng.randbytes(rng.randrange(3000))),
            (form, frame % rng.randbytes(3000)), (form, rng.randbytes(3000)),
        ][number % 6]


def test_300_hostile_bodies_leave_the_server_as_it_was(server, radiograph):
    statuses = []
    for headers, body in hostile_bodies(radiograph, 300):
        status, answer, _ = server.call("POST", "/predict", body, headers)
        statuses.append(status)
        assert status == 200 or "\n" not in answer["detail"]
    print({status: statuses.count(status) for status in sorted(set(statuses))})
    assert set(statuses) <= {200, 400, 503} and statuses.count(400) > 150
    assert not list(server.folder.iterdir()) and not Path(server.log.name).read_text()
    assert server.predict("a", radiograph)[0] == 200


# The process


@linux
def test_readers_that_are_killed_cost_no_later_request(server, radiograph):
    before = server.readers()
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    while any(" Z " not in Path(f"/proc/{pid}/stat").read_text() for pid in before):
        time.sleep(0.1)  # they die slowly on a busy machine
    assert [server.predict("a", radiograph)[0] for _ in range(8)] == [200] * 8
    after = server.readers()
    assert len(after) == len(before) == endpoint.READERS and not set(after) & set(before)


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_server_and_readers(checkpoint, tmp_path, radiograph, number):
    (tmp_path / "empty").mkdir()
    server = Server(checkpoint, tmp_path / "empty")
    readers = server.readers()
    assert server.predict("a patient", radiograph)[0] == 200
    assert server.upload("a patient.txt", b"a patient")[0] == 400
    assert server.stop(number) == (128 + number, "endpoint.py: stopped\n")
    assert len(readers) == endpoint.READERS
    assert not [pid for pid in readers if Path(f"/proc/{pid}").exists()]


def run_endpoint(*flags, code="import endpoint, cli; cli.run(endpoint.main)", **variables):
    done = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | variables, timeout=60)
    [line] = done.stderr.splitlines()
    return done.returncode, line


def test_a_port_in_use_is_one_line(server):
    status, line = run_endpoint("--port", server.url.rpartition(":")[2])
    assert status == 2 and "Address already in use" in line and "--port" in line


def test_a_missing_checkpoint_is_one_line():
    status, line = run_endpoint("--port", "0", MODEL_CHECKPOINT="nowhere.pth.tar")
    assert status == 2 and "nowhere.pth.tar does not exist" in line and "MODEL_CHECKPOINT" in line


@pytest.mark.parametrize("name", ["fastapi", "uvicorn", "python_multipart"])
def test_a_missing_package_is_one_line(name):
    code = f"import sys; sys.modules['{name}'] = None; import endpoint, cli; cli.run(endpoint.main)"
    status, line = run_endpoint(code=code)
    assert status == 2 and line.endswith("missing: pip install -r requirements-extra.txt")


# The page


PAGE = (ROOT / "endpoint.html").read_text("utf-8")


def test_the_page_allows_its_own_script_alone():
    [script] = re.findall("<script>(.*?)</script>", PAGE, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in PAGE


def test_the_page_names_no_host_and_makes_no_markup():
    assert not re.search(r"https?:|//\w|innerHTML|insertAdjacentHTML|document\.write|eval\(", PAGE)


def test_the_page_is_served(server):
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    connection.request("GET", "/")
    response = connection.getresponse()
    assert response.read().decode() == PAGE
    assert response.headers["Content-Type"].startswith("text/html")
    connection.close()


# predict_scan.sh


def scan(folder, *words, tools=None):
    """The script in `folder`; with `tools` nothing else is on the PATH."""
    variables = dict(os.environ)
    if tools:
        (folder / "bin").mkdir()
        for tool in tools:
            place = sys._base_executable if tool == "python3" else shutil.which(tool)
            (folder / "bin" / tool).symlink_to(place)
        variables["PATH"] = str(folder / "bin")
    return subprocess.run([shutil.which("sh"), SCAN, *map(str, words)], cwd=folder, text=True,
                          capture_output=True, env=variables, timeout=60)


TOOLS = ["curl", "base64", "mktemp", "rm", "mv", "sed", "tr"]


@pytest.mark.parametrize("tool", ["python3", "jq"])
def test_a_scan_is_written_with_python_or_jq(server, radiograph, tmp_path, tool):
    if missing := [name for name in (*TOOLS, tool) if not shutil.which(name)]:
        pytest.skip(f"needs {' and '.join(missing)}")
    (tmp_path / "a scan.dcm").write_bytes(radiograph)
    done = scan(tmp_path, server.url, "a scan.dcm", tools=[*TOOLS, tool])
    _, answer = server.predict("a scan", radiograph)
    picture = (tmp_path / "annotated_image.png").read_bytes()
    assert base64.b64decode(answer["a scan"]["image"]) == picture
    assert done.stdout == f"annotated_image.png: {answer['a scan']['annotations']}\n"
    assert not done.stderr


def test_a_scan_named_by_a_uid_keeps_all_of_it(server, radiograph, tmp_path):
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    (tmp_path / "1.2.840").write_bytes(radiograph)
    scan(tmp_path, server.url, "1.2.840")
    _, answer = server.predict("1.2.840", radiograph)
    picture = (tmp_path / "annotated_image.png").read_bytes()
    assert base64.b64decode(answer["1.2.840"]["image"]) == picture


@pytest.mark.parametrize("words, reason", [
    (["{url}"], "give the endpoint's URL and a file"),
    (["{url}", "none.dcm"], "none.dcm is not a file that can be read"),
    (["http://127.0.0.1:1", "text.txt"], "http://127.0.0.1:1 does not answer"),
    (["{url}", "text.txt"], "text.txt is not a DICOM file"),
    (["{url}", "large"], "large is larger than 50,331,648 bytes")])
def test_a_scan_that_fails_says_why_in_one_line_and_leaves_no_file(
        server, tmp_path, words, reason):
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "large").write_bytes(bytes(endpoint.MAX_BODY))
    done = scan(tmp_path, *[word.format(url=server.url) for word in words])
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"predict_scan.sh: error: {reason}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "text.txt"]


@linux
def test_a_scan_in_a_folder_that_is_read_only_says_so(server, radiograph, tmp_path):
    (tmp_path / "a.dcm").write_bytes(radiograph)
    done = scan(Path("/proc"), server.url, tmp_path / "a.dcm")
    assert (done.returncode, done.stderr) == (
        1, "predict_scan.sh: error: cannot write to /proc\n")


def test_a_backslash_in_the_name_of_a_scan_is_printed_as_it_is(tmp_path):
    done = scan(tmp_path, "http://127.0.0.1:1", r"a\tb.dcm")
    assert done.stderr == "predict_scan.sh: error: a\\tb.dcm is not a file that can be read\n"
