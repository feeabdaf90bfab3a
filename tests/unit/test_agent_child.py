"""What an agent's child says of a failure: whether another node could do better."""

import threading
from pathlib import Path

from csi_driver.agent.jobs import Job
from csi_driver.agent.work import Download, Failed, Request
from csi_driver.keys.audit import Audit
from tests.image_server import ImageServer, status


def test_what_a_server_does_not_have_is_asked_of_it_from_no_other_node(tmp_path: Path) -> None:
    server = ImageServer()
    server.answers = [status(404)]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    try:
        work = Download(server.url(), None, 1 << 20, {})
        wanted = Request(folder=str(tmp_path), name="disk", owner="uid", secret=None, allow_local=True, work=work)
        job = Job(wanted, Audit(None), lambda: None)
        assert job.join(60)
    finally:
        server.shutdown()
        server.server_close()
    assert isinstance(job.result, Failed)
    assert "(status 404)" in job.result.text
    assert (job.result.elsewhere, job.result.permanent) == (False, False)
