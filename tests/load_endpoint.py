"""Loads the endpoint with clients that call it all at once, on the loopback, for a few seconds.

    MODEL_CHECKPOINT=output/final.pth.tar python tests/load_endpoint.py data/stage_2_test_images

Prints the requests answered, the errors, the 95th percentile of the latency, and the memory of
server and readers before and after.
"""

import http.client
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLIENTS, SECONDS, WARM_UP_SECONDS = 8, 10, 3


def memory(pid):
    """Resident megabytes of a server, and of its readers together; shared pages count in each."""
    readers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    pages = [int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in (pid, *readers)]
    return f"{pages[0] / 256:.0f} MB server, {sum(pages[1:]) / 256:.0f} MB readers"


def call_until(end, address, files):
    """Statuses and seconds of requests, one after the other."""
    calls, connection = [], http.client.HTTPConnection(address, timeout=60)
    for content in cycle(files):
        if time.monotonic() > end:
            return calls
        body = (b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.dcm"\r\n\r\n'
                + content + b"\r\n--b--\r\n")
        started = time.monotonic()
        connection.request("POST", "/predict", body,
                           {"Content-Type": "multipart/form-data; boundary=b"})
        response = connection.getresponse()
        response.read()
        calls.append((response.status, time.monotonic() - started))


def load(seconds, address, files):
    end = time.monotonic() + seconds
    with ThreadPoolExecutor(CLIENTS) as clients:
        runs = [clients.submit(call_until, end, address, files) for _ in range(CLIENTS)]
    return [call for run in runs for call in run.result()]


def main():
    files = [path.read_bytes() for path in sorted(Path(sys.argv[1]).iterdir())[:20]]
    server = subprocess.Popen([sys.executable, ROOT / "endpoint.py", "--port", "0"], text=True,
                              stdout=subprocess.PIPE)
    try:
        address = server.stdout.readline().partition("http://")[2].partition(";")[0]
        if not address:
            sys.exit(1)  # the server has said why
        load(WARM_UP_SECONDS, address, files)
        print("before:", memory(server.pid))
        calls = load(SECONDS, address, files)
        print("after: ", memory(server.pid))
    finally:
        server.terminate()
        server.wait()
    errors = [status for status, _ in calls if status != 200]
    p95 = statistics.quantiles([seconds for _, seconds in calls], n=20)[-1]
    print(f"{len(calls)} requests of {CLIENTS} clients in {SECONDS} s, {len(errors)} errors, "
          f"95th percentile {1000 * p95:.0f} ms")
    sys.exit(bool(errors))


if __name__ == "__main__":
    main()
