"""What is staged on this node: one file per volume, which means nothing after a reboot."""

from pathlib import Path

import msgspec
import pytest

from csi_driver.host.files import Files
from csi_driver.volumes.stages import Stage, Stages

MOUNTED = Stage(
    staging_path="/stage/one",
    block=False,
    device="/dev/mapper/luks-pvc-1",
    fs_type="ext4",
    mount_options=("noatime", "ro"),
    read_only=True,
    luks_uuid="6f1c2b1e-0a55-4c3e-9d3c-5a3c8b0f7d21",
)
SHOWN = Stage(staging_path="/stage/two", block=True, device="/dev/loop3")


def test_a_stage_comes_back_also_to_the_next_process(tmp_path: Path) -> None:
    stages = Stages(tmp_path, Files())
    stages.put("pvc-1", MOUNTED)
    stages.put("pvc-2", SHOWN)
    for reader in (stages, Stages(tmp_path, Files())):
        assert (reader.get("pvc-1"), reader.get("pvc-2"), reader.get("pvc-3")) == (MOUNTED, SHOWN, None)


def test_a_later_stage_replaces_an_earlier_one(tmp_path: Path) -> None:
    stages = Stages(tmp_path, Files())
    stages.put("pvc-1", MOUNTED)
    stages.put("pvc-1", SHOWN)
    assert stages.get("pvc-1") == SHOWN


def test_a_removed_stage_is_gone_whole_and_absent_is_fine(tmp_path: Path) -> None:
    stages = Stages(tmp_path, Files())
    stages.put("pvc-1", MOUNTED)
    (tmp_path / ".pvc-1.new").write_bytes(b"a write that was cut")
    stages.remove("pvc-1")
    stages.remove("pvc-1")
    assert stages.get("pvc-1") is None
    assert not list(tmp_path.iterdir())


def test_a_stage_of_an_earlier_boot_is_none(tmp_path: Path) -> None:
    stages = Stages(tmp_path, Files())
    stages.put("pvc-1", MOUNTED)
    document = msgspec.json.decode((tmp_path / "pvc-1").read_bytes())
    (tmp_path / "pvc-1").write_bytes(msgspec.json.encode(document | {"boot_id": "another"}))
    assert stages.get("pvc-1") is None
    stages.put("pvc-1", SHOWN)
    assert stages.get("pvc-1") == SHOWN


@pytest.mark.parametrize(
    "content",
    [b"", bytes(300), b"{", b'{"boot_id":', b'{"boot_id":"\xff"}', b"[]", b"null", b'{"a":' * 50_000, b"\xff\xfe" * 50],
    ids=lambda content: content[:12].hex() or "empty",
)
def test_a_file_that_a_power_cut_damaged_is_no_stage(tmp_path: Path, content: bytes) -> None:
    stages = Stages(tmp_path, Files())
    (tmp_path / "pvc-1").write_bytes(content)
    assert stages.get("pvc-1") is None


def test_a_file_that_is_cut_anywhere_is_no_stage(tmp_path: Path) -> None:
    stages = Stages(tmp_path, Files())
    stages.put("pvc-1", MOUNTED)
    whole = (tmp_path / "pvc-1").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "pvc-1").write_bytes(whole[:length])
        assert stages.get("pvc-1") is None


def test_without_its_folder_nothing_is_staged(tmp_path: Path) -> None:
    assert Stages(tmp_path / "absent", Files()).get("pvc-1") is None
