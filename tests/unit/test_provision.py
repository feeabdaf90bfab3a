"""The controller's use cases over a backend in memory."""

import itertools
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.backends.base import Space
from csi_driver.keys.secret import SecretKey, read_secret
from csi_driver.luks import formats
from csi_driver.model.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    InvalidToken,
    NotFound,
    OutOfRange,
    ResourceExhausted,
)
from csi_driver.model.settings import Limits, Settings
from csi_driver.model.volume import (
    EncryptionState,
    FileSystemState,
    LuksIdentity,
    VolumeParameters,
    VolumeRecord,
    is_volume_id,
    volume_id_for,
)
from csi_driver.volumes.capability import AccessMode, Capability
from csi_driver.volumes.provision import Capacity, CreateRequest, Provisioning
from csi_driver.volumes.sizing import LARGEST_BYTES
from tests.fake_host import MemoryBackend, no_images, no_kms

MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40
HERE = {"topology.luks.csi.internal/node": "node-1"}
MOUNT = Capability(AccessMode.SINGLE_NODE_WRITER, block=False)
BLOCK = Capability(AccessMode.SINGLE_NODE_WRITER, block=True)
ENCRYPTED = {"encrypted": "true"}
DEFAULT_LIMITS = Limits()
KEY = read_secret({"CRYPTO_KEY_VALUE": "secret"})


def provisioning(backend: MemoryBackend | None = None, limits: Limits = DEFAULT_LIMITS) -> Provisioning:
    settings = Settings(node_id="node-1", limits=limits)
    return Provisioning(settings, backend or MemoryBackend(), no_images(), lambda: None, lambda _: None, no_kms())


def request(  # one keyword for each field of the message
    name: str = "pvc-1",
    required: int = GIB,
    limit: int = 0,
    capabilities: tuple[Capability, ...] = (MOUNT,),
    parameters: Mapping[str, str] = ENCRYPTED,
    key: SecretKey = KEY,
    topologies: tuple[Mapping[str, str], ...] = (),
) -> CreateRequest:
    return CreateRequest(name, required, limit, capabilities, parameters, key, topologies)


def record(volume_id: str, **fields: object) -> VolumeRecord:
    made = VolumeRecord(id=volume_id, name=volume_id, capacity_bytes=GIB, parameters=VolumeParameters(), created="now")
    return msgspec.structs.replace(made, **fields)


# --- create ----------------------------------------------------------------------------------------------------------


def test_an_encrypted_volume_is_tagged_and_has_room_for_its_header() -> None:
    backend = MemoryBackend()
    view = provisioning(backend).create(request())
    assert view.record == backend.records["pvc-1"]
    assert (view.record.encryption, view.record.file_system) == (EncryptionState.PREPARED, FileSystemState.NONE)
    assert view.record.capacity_bytes == GIB
    assert view.record.luks is None
    assert backend.sizes == {"pvc-1": GIB + 16 * MIB}
    assert view.context == {"encrypted": "true", "backend": "memory"}
    assert view.places == [HERE]


def test_a_plain_volume_has_no_header() -> None:
    backend = MemoryBackend()
    view = provisioning(backend).create(request(parameters={}))
    assert view.record.encryption is None
    assert backend.sizes == {"pvc-1": GIB}
    assert view.context == {"encrypted": "false", "backend": "memory"}


def test_more_replicas_than_there_are_show_in_the_context() -> None:
    view = provisioning().create(request(parameters={"numberOfReplicas": "3"}))
    assert view.context["copies"] == "1 (numberOfReplicas 3 was asked for)"


def test_a_repeat_finds_the_volume_and_changes_nothing() -> None:
    backend = MemoryBackend()
    made = provisioning(backend).create(request(parameters=ENCRYPTED | {"csi.storage.k8s.io/pvc/name": "a"}))
    for again in (request(), request(required=1), request(limit=2 * GIB), request(required=GIB, limit=GIB)):
        assert provisioning(backend).create(again) == made
    assert list(backend.records) == ["pvc-1"]


XFS = msgspec.structs.replace(MOUNT, fs_type="xfs")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (request(required=GIB + 1), r"1073741824 bytes"),
        (request(required=1, limit=GIB - 1), r"1073741824 bytes"),
        (request(parameters={}), r"other parameters"),
        (request(parameters=ENCRYPTED | {"discard": "true"}), r"other parameters"),
        (request(capabilities=(XFS,)), r"another file system"),
        (request(parameters=ENCRYPTED | {"fstype": "btrfs"}), r"another file system"),
    ],
)
def test_the_same_name_with_other_properties_exists_already(other: CreateRequest, said: str) -> None:
    driver = provisioning()
    driver.create(request())
    with pytest.raises(AlreadyExists, match=said):
        driver.create(other)


def test_a_hash_that_meets_another_name_is_no_match() -> None:
    backend = MemoryBackend()
    driver = provisioning(backend)
    made = driver.create(request(name="Long Name")).record
    backend.records[made.id] = msgspec.structs.replace(made, name="another")
    with pytest.raises(AlreadyExists, match=r"the name 'another'"):
        driver.create(request(name="Long Name"))


@pytest.mark.parametrize("name", ["", "x" * 129, "é" * 65, "a\0b", "\0", "a\x1fb", "a\x7f", "\x9f", "a\x0bb"])
def test_a_name_that_csi_forbids_is_refused(name: str) -> None:
    backend = MemoryBackend()
    with pytest.raises(InvalidArgument, match=r"name must have 1 to 128 bytes and no control characters"):
        provisioning(backend).create(request(name=name))
    assert not backend.records


@pytest.mark.parametrize(
    "name",
    [
        *("x" * 128, "é" * 64, "a" * 65, "../../etc/passwd", ".", "..", "a/b", "-", "-rf", ".hidden"),
        *("PVC-1", "pvc_1", "a b\tc\nd", "卷", "x-1", "x-" + "0" * 64),
    ],
)
def test_any_other_name_gets_a_safe_id_of_its_own(name: str) -> None:
    made = provisioning().create(request(name=name)).record
    assert made.name == name
    assert made.id == volume_id_for(name)
    assert is_volume_id(made.id)
    assert "/" not in made.id
    assert made.id.startswith("x-")


def test_a_short_safe_name_is_the_id() -> None:
    for name in ("pvc-0b5f6a2e-1c1f-4b0e-9c9b-0d0f9d1b1a5e", "a", "0", "a.b", "a" * 64):
        assert volume_id_for(name) == name


@given(st.text(min_size=1, max_size=140), st.text(min_size=1, max_size=140))
def test_two_names_never_share_an_id(one: str, other: str) -> None:
    """Not even the name that looks like the id of another."""
    ids = {name: volume_id_for(name) for name in (one, other)}
    ids |= {name: volume_id_for(name) for name in ids.values()}
    assert len(set(ids.values())) == len(ids)
    assert all(is_volume_id(volume_id) and len(f"luks-{volume_id}") <= 71 for volume_id in ids.values())


# --- capacity range --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", [{}, ENCRYPTED, ENCRYPTED | {"sectorSize": "4096"}])
@pytest.mark.parametrize("size", [8 * MIB, 64 * MIB, GIB, GIB + 4096])
def test_required_equal_to_limit_is_met_to_the_byte(parameters: dict[str, str], size: int) -> None:
    backend = MemoryBackend()
    made = provisioning(backend).create(request(required=size, limit=size, parameters=parameters)).record
    assert made.capacity_bytes == size
    assert backend.sizes["pvc-1"] == size + (16 * MIB if parameters else 0)


@pytest.mark.parametrize(
    ("required", "limit", "parameters", "capacity"),
    [
        (0, 0, {}, GIB),
        (1, 0, {}, 8 * MIB),
        (0, 100 * MIB, {}, 100 * MIB),
        (0, 100 * MIB + 1, {}, 100 * MIB),
        (0, 2 * GIB, {}, GIB),
        (GIB + 1, 0, {}, GIB + 512),
        (GIB + 1, 0, {"sectorSize": "4096"}, GIB + 4096),
        (GIB + 1, 0, {"encrypted": "true"}, GIB + 4096),
        (GIB + 1, GIB + 512, {"encrypted": "true"}, GIB + 512),
        (GIB + 1, GIB + 512, {}, GIB + 512),
        (1, GIB, {"fstype": "xfs"}, 300 * MIB),
        (1, GIB, {"fstype": "btrfs"}, 256 * MIB),
        ((1 << 63) - (1 << 30), 0, {}, (1 << 63) - (1 << 30)),
    ],
)
def test_a_capacity_within_the_range_is_chosen(
    required: int, limit: int, parameters: dict[str, str], capacity: int
) -> None:
    driver = provisioning(MemoryBackend(total=1 << 64))
    found = driver.create(request(required=required, limit=limit, parameters=parameters)).record
    assert found.capacity_bytes == capacity


@pytest.mark.parametrize(
    ("wished", "chosen"),
    [
        ({}, 4096),
        ({"capabilities": (BLOCK,)}, None),
        ({"capabilities": (MOUNT, BLOCK)}, None),
        ({"parameters": {}}, None),
        ({"parameters": ENCRYPTED | {"sectorSize": "512"}}, 512),
        ({"parameters": ENCRYPTED | {"mkfsOptions": "-b 1024"}}, None),
        ({"parameters": ENCRYPTED | {"mkfsOptions": "-b 4096 -I 512"}}, 4096),
        ({"parameters": ENCRYPTED | {"mkfsOptions": "-b size=4k -s size=512", "fstype": "xfs"}}, None),
        ({"parameters": ENCRYPTED | {"mkfsOptions": "-s size=4k", "fstype": "xfs"}}, 4096),
        ({"required": GIB + 512, "limit": GIB + 512}, None),
        ({"required": GIB + 1, "limit": GIB + 4096}, 4096),
        ({"required": 0, "limit": GIB + 512}, 4096),
        ({"required": 512 * MIB}, 4096),
        ({"required": 512 * MIB - 4096}, None),
        ({"required": 0, "limit": 256 * MIB}, None),
    ],
    ids=str,
)
def test_sectors_are_large_where_only_a_file_system_sees_them(wished: dict[str, Any], chosen: int | None) -> None:
    backend = MemoryBackend()
    driver = provisioning(backend)
    record = driver.create(request(**wished)).record
    assert record.parameters.sector_size == chosen
    assert driver.create(request(**wished)).record == record  # made once


def test_a_volume_that_was_made_with_small_sectors_is_still_that_of_its_class() -> None:
    backend = MemoryBackend()
    driver = provisioning(backend)
    made = driver.create(request()).record
    older = msgspec.structs.replace(made.parameters, sector_size=None)
    backend.records[made.id] = msgspec.structs.replace(made, parameters=older)
    assert driver.create(request()).record.parameters.sector_size is None
    assert driver.refusal(made.id, {}, ENCRYPTED, (MOUNT,)) is None
    with pytest.raises(AlreadyExists, match="other parameters"):
        driver.create(request(parameters=ENCRYPTED | {"sectorSize": "4096"}))


@pytest.mark.parametrize(
    ("required", "limit", "parameters", "error"),
    [
        (-1, 0, {}, InvalidArgument),
        (0, -1, {}, InvalidArgument),
        (2 * GIB, GIB, {}, InvalidArgument),
        (0, 1, {}, OutOfRange),
        (1, 8 * MIB - 1, {}, OutOfRange),
        (1, 299 * MIB, {"fstype": "xfs"}, OutOfRange),
        (GIB + 1, GIB + 1, {}, OutOfRange),
        (GIB + 512, GIB + 512, {"sectorSize": "4096"}, OutOfRange),
        ((1 << 63) - 1, 0, {}, OutOfRange),
        ((1 << 63) - (1 << 30) + 1, 0, {}, OutOfRange),
        (1 << 62, 0, {}, ResourceExhausted),
    ],
)
def test_a_range_that_cannot_be_met_is_refused(
    required: int, limit: int, parameters: dict[str, str], error: type[Exception]
) -> None:
    backend = MemoryBackend()
    with pytest.raises(error):
        provisioning(backend).create(request(required=required, limit=limit, parameters=parameters))
    assert not backend.records


@given(
    st.integers(-2, 3 * GIB) | st.integers(0, (1 << 63) - 1),
    st.integers(-2, 3 * GIB) | st.integers(0, (1 << 63) - 1),
    st.sampled_from(["512", "1024", "2048", "4096"]),
)
def test_whatever_the_range_the_capacity_is_in_it_and_in_whole_sectors(required: int, limit: int, sector: str) -> None:
    driver = provisioning(MemoryBackend(total=1 << 64))
    wish = request(required=required, limit=limit, parameters=ENCRYPTED | {"sectorSize": sector})
    try:
        capacity = driver.create(wish).record.capacity_bytes
    except (InvalidArgument, OutOfRange):
        return
    assert capacity >= required >= 0
    assert not limit or capacity <= limit
    assert capacity % int(sector) == 0
    assert driver.create(wish).record.capacity_bytes == capacity


def test_a_block_volume_needs_no_room_for_a_file_system() -> None:
    made = provisioning().create(request(required=MIB, capabilities=(BLOCK,), parameters={"fstype": "xfs"})).record
    assert made.capacity_bytes == MIB


@pytest.mark.parametrize(
    ("parameters", "key"),
    [
        ({"cipher": "aes-xts-plain"}, KEY),
        ({}, read_secret({"CRYPTO_KEY_VALUE": "x", "CRYPTO_KEY_CIPHER": "aes-xts-plain"})),
        ({}, read_secret({"CRYPTO_KEY_VALUE": "x", "CRYPTO_KEY_CIPHER": "aes-cbc-plain"})),
    ],
)
def test_a_plain_iv_bounds_the_capacity_whoever_chose_the_cipher(parameters: dict[str, str], key: SecretKey) -> None:
    driver = provisioning()
    driver.create(request(required=2 * TIB, parameters=ENCRYPTED | parameters, key=key))
    with pytest.raises(OutOfRange, match=r"repeats its IV"):
        driver.create(request("pvc-2", required=2 * TIB + 1, parameters=ENCRYPTED | parameters, key=key))
    driver.create(request("pvc-3", required=3 * TIB, parameters=parameters, key=key))  # not encrypted


# --- what else create refuses ----------------------------------------------------------------------------------------


def test_a_volume_is_made_on_this_node_only() -> None:
    backend = MemoryBackend()
    driver = provisioning(backend)
    with pytest.raises(ResourceExhausted, match=r"node node-1: none of the wished topologies"):
        driver.create(request(topologies=({next(iter(HERE)): "node-2"}, {"zone": "a"}, {**HERE, "zone": "a"})))
    assert not backend.records
    assert driver.create(request(topologies=({"zone": "a"}, HERE))).places == [HERE]


@pytest.mark.parametrize(
    "refused",
    [
        msgspec.structs.replace(MOUNT, mode=AccessMode.MULTI_NODE_MULTI_WRITER),
        msgspec.structs.replace(BLOCK, mode=AccessMode.MULTI_NODE_READER_ONLY),
        msgspec.structs.replace(MOUNT, fs_type="ntfs"),
        msgspec.structs.replace(MOUNT, mount_flags=("suid",)),
        msgspec.structs.replace(MOUNT, fs_type="ext4", mount_flags=("nouuid",)),
    ],
)
def test_a_capability_that_cannot_be_had_is_refused_everywhere(refused: Capability) -> None:
    driver = provisioning()
    with pytest.raises(InvalidArgument):
        driver.create(request(capabilities=(MOUNT, refused)))
    driver.create(request())
    assert driver.refusal("pvc-1", {}, {}, [MOUNT, refused])
    assert driver.capacity({}, None, [refused]) == Capacity(0, 0)


def test_a_key_derivation_that_the_smallest_node_cannot_pay_is_refused() -> None:
    driver = provisioning(limits=Limits(pbkdf_memory_kib=32 * 1024))
    with pytest.raises(FailedPrecondition, match=r"pbkdfMemory is 65536 KiB and this driver allows 32768"):
        driver.create(request(parameters=ENCRYPTED | {"pbkdfMemory": "65536"}))
    driver.create(request(parameters=ENCRYPTED | {"pbkdfMemory": "32768"}))
    driver.create(request("default"))  # the default gives way to the limit


def test_the_backend_is_named_rightly_or_not_at_all() -> None:
    driver = provisioning()
    driver.create(request(parameters={"backend": "memory"}))
    for refused in ("rbd", "", "Memory"):
        with pytest.raises(InvalidArgument, match=r"this driver serves 'memory'"):
            driver.create(request("pvc-2", parameters={"backend": refused}))


def test_the_file_system_of_capability_and_parameter_must_agree() -> None:
    driver = provisioning()
    assert driver.create(request(capabilities=(XFS, BLOCK))).record.parameters.fs_type == "xfs"
    for capabilities, parameters in (
        ((XFS,), {"fstype": "ext4"}),
        ((XFS, msgspec.structs.replace(MOUNT, fs_type="ext4")), {}),
    ):
        with pytest.raises(InvalidArgument, match=r"make them equal"):
            driver.create(request("pvc-2", capabilities=capabilities, parameters=parameters))


def test_mkfs_options_belong_to_the_file_system_of_the_capability() -> None:
    """A provisioner takes csi.storage.k8s.io/fstype out of the parameters and puts it into the capability."""
    driver, options = provisioning(), {"mkfsOptions": "-d agcount=4"}
    made = driver.create(request(capabilities=(XFS,), parameters=options))
    assert made.record.parameters.mkfs_options == ("-d", "agcount=4")
    driver.create(request("block", capabilities=(BLOCK,), parameters=options))
    with pytest.raises(InvalidArgument, match=r"mkfs.ext4"):
        driver.create(request("other", parameters=options))


# --- delete, get, validate -------------------------------------------------------------------------------------------


def test_delete_needs_no_key_and_no_volume() -> None:
    backend = MemoryBackend()
    driver = provisioning(backend)
    driver.create(request())
    driver.delete("pvc-1")
    driver.delete("pvc-1")
    driver.delete("never-was")
    assert not backend.records


@pytest.mark.parametrize("volume_id", ["", ".", "..", "../x", "PVC", "a/b", "-a", "a" * 67, "a\0", "a\n"])
def test_what_is_no_id_reaches_no_backend(volume_id: str) -> None:
    driver = provisioning()
    with pytest.raises(NotFound):
        driver.get(volume_id)
    with pytest.raises(NotFound):
        driver.expand(volume_id, GIB, 0)
    with pytest.raises(NotFound):
        driver.refusal(volume_id, {}, {}, [MOUNT])


def test_a_volume_is_validated_by_what_its_class_said() -> None:
    """The parameters of the class say no file system: it came with the capability."""
    driver = provisioning()
    ext4 = msgspec.structs.replace(MOUNT, fs_type="ext4")
    view = driver.create(request(capabilities=(ext4,), parameters=ENCRYPTED | {"csi.storage.k8s.io/pvc/name": "a"}))
    assert driver.refusal("pvc-1", view.context, ENCRYPTED, [ext4]) is None
    assert driver.refusal("pvc-1", view.context, ENCRYPTED | {"fstype": "ext4"}, [ext4, MOUNT, BLOCK]) is None
    assert driver.refusal("pvc-1", {}, {}, [MOUNT]) is None
    for parameters in ({"encrypted": "false"}, ENCRYPTED | {"fstype": "xfs"}, ENCRYPTED | {"discard": "true"}):
        assert driver.refusal("pvc-1", {}, parameters, [MOUNT]) == "volume pvc-1 was made with other parameters"
    said = driver.refusal("pvc-1", {}, ENCRYPTED, [XFS])
    assert said == "volume pvc-1 has the file system ext4, not xfs"


def test_the_record_decides_and_a_context_that_disagrees_is_refused() -> None:
    driver = provisioning()
    driver.create(request())
    with pytest.raises(FailedPrecondition, match=r"says encrypted='false' .* says 'true'"):
        driver.refusal("pvc-1", {"encrypted": "false"}, {}, [MOUNT])


# --- list ------------------------------------------------------------------------------------------------------------


def pages(driver: Provisioning, size: int) -> list[list[str]]:
    found, token = [], ""
    while True:
        views, token = driver.list(size, token)
        found.append([view.record.id for view in views])
        if not token:
            return found


def test_pages_hold_all_volumes_in_order() -> None:
    backend = MemoryBackend({name: record(name) for name in "cabed"})
    assert pages(provisioning(backend), 2) == [["a", "b"], ["c", "d"], ["e"]]
    assert pages(provisioning(backend), 5) == pages(provisioning(backend), 0) == [["a", "b", "c", "d", "e"]]
    assert pages(provisioning(), 3) == [[]]


IDS = st.sampled_from(["0", "a", "a-", "a.", "a0", "aa", "b", "b-b", "b.", "ba", "c", "x-0"])


@given(st.sets(IDS), st.lists(st.lists(st.tuples(st.booleans(), IDS), max_size=4), max_size=8), st.integers(1, 4))
def test_volumes_that_are_there_all_the_time_are_listed_exactly_once(
    at_first: set[str], changes: list[list[tuple[bool, str]]], size: int
) -> None:
    backend = MemoryBackend({name: record(name) for name in at_first})
    driver, token, listed, lasting, ever = provisioning(backend), "", list[str](), set(at_first), set(at_first)
    for between in itertools.chain(changes, itertools.repeat([], 12)):
        views, token = driver.list(size, token)
        assert len(views) <= size
        listed += [view.record.id for view in views]
        if not token:
            break
        for added, name in between:
            if added:
                backend.records.setdefault(name, record(name))
                ever.add(name)
            else:
                backend.delete(name)
                lasting.discard(name)
    else:
        raise AssertionError("the list has no end")
    assert listed == sorted(set(listed))
    assert lasting <= set(listed) <= ever


@pytest.mark.parametrize("token", ["x", "1", "after:", "after:../x", "after:A", "before:a", "after:a\n", " after:a"])
def test_a_token_that_was_never_given_out_is_refused(token: str) -> None:
    with pytest.raises(InvalidToken, match=r"was not given out by this driver"):
        provisioning(MemoryBackend({"a": record("a")})).list(1, token)


def test_a_token_outlives_the_volume_that_it_names() -> None:
    backend = MemoryBackend({name: record(name) for name in "abc"})
    driver = provisioning(backend)
    _, token = driver.list(1, "")
    backend.delete("a")
    backend.delete("b")
    assert [view.record.id for view in driver.list(1, token)[0]] == ["c"]
    backend.delete("c")
    assert driver.list(1, token) == ([], "")


def test_a_negative_page_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"max_entries is -1"):
        provisioning().list(-1, "")


def test_a_volume_with_a_damaged_record_does_not_hide_the_others() -> None:
    class Damaged(MemoryBackend):
        def get(self, volume_id: str) -> VolumeRecord:
            if volume_id == "b":
                raise FailedPrecondition("the record cannot be read")
            if volume_id == "c":
                raise NotFound("deleted since it was listed")
            return super().get(volume_id)

    backend = Damaged({name: record(name) for name in "abcd"})
    assert pages(provisioning(backend), 1) == [["a"], [], [], ["d"]]
    assert pages(provisioning(backend), 0) == [["a", "d"]]


# --- capacity and growth ---------------------------------------------------------------------------------------------


def test_capacity_is_what_a_pod_would_see() -> None:
    driver = provisioning(MemoryBackend(total=10 * GIB))
    assert driver.capacity({}, None, [MOUNT]) == Capacity(10 * GIB, 10 * GIB)
    assert driver.capacity(ENCRYPTED, HERE, []) == Capacity(10 * GIB - 16 * MIB, 10 * GIB - 16 * MIB)
    assert driver.capacity({}, {next(iter(HERE)): "node-2"}, []) == Capacity(0, 0)
    assert driver.capacity({}, {"zone": "a"}, []) == Capacity(0, 0)
    assert provisioning(MemoryBackend(total=MIB)).capacity(ENCRYPTED, None, []) == Capacity(0, 0)
    assert provisioning(MemoryBackend(total=1 << 70)).capacity({}, None, []).maximum == (1 << 63) - (1 << 30)


@pytest.mark.parametrize(
    "refused", [{"encrypted": "maybe"}, {"encryptd": "true"}, {"backend": "rbd"}, {"thinPool": "a"}]
)
def test_a_class_that_is_refused_has_room_without_an_end_so_that_it_can_be_refused(refused: dict[str, str]) -> None:
    driver = provisioning(MemoryBackend(total=10 * GIB))
    assert driver.capacity(refused, HERE, []) == Capacity(LARGEST_BYTES, LARGEST_BYTES)
    assert driver.capacity(refused, {next(iter(HERE)): "node-2"}, []) == Capacity(0, 0)
    with pytest.raises(InvalidArgument):
        driver.create(request(parameters=refused))


def test_a_class_that_asks_the_backend_for_what_it_does_not_know_has_room_without_an_end() -> None:
    class Clusters(MemoryBackend):
        def space(self, parameters: VolumeParameters | None = None) -> Space:
            if parameters is not None and parameters.encrypted:
                raise InvalidArgument("no such cluster")
            return super().space(parameters)

    driver = provisioning(Clusters(total=10 * GIB))
    assert driver.capacity(ENCRYPTED, None, []) == Capacity(LARGEST_BYTES, LARGEST_BYTES)


@pytest.mark.parametrize("parameters", [{}, ENCRYPTED])
def test_a_volume_that_fills_the_maximum_can_be_made(parameters: dict[str, str]) -> None:
    driver = provisioning(MemoryBackend(total=GIB))
    driver.create(request(required=driver.capacity(parameters, None, []).maximum, parameters=parameters))
    assert driver.capacity(parameters, None, []).maximum == 0


def test_expand_grows_device_then_record_and_never_shrinks() -> None:
    backend = MemoryBackend()
    driver = provisioning(backend)
    driver.create(request(parameters=ENCRYPTED | {"sectorSize": "512"}))
    assert driver.expand("pvc-1", 2 * GIB + 1, 0) == 2 * GIB + 512
    assert backend.sizes["pvc-1"] == 2 * GIB + 512 + 16 * MIB
    for required, limit in ((GIB, 0), (0, 0), (1, 3 * GIB), (2 * GIB + 1, 2 * GIB + 512)):
        assert driver.expand("pvc-1", required, limit) == 2 * GIB + 512
    assert driver.get("pvc-1").record.capacity_bytes == 2 * GIB + 512


@pytest.mark.parametrize(
    ("required", "limit", "error"),
    [
        (-1, 0, InvalidArgument),
        (0, -1, InvalidArgument),
        (3 * GIB, 2 * GIB, InvalidArgument),
        (0, GIB - 1, OutOfRange),
        (GIB // 2, GIB - 512, OutOfRange),
        (2 * GIB - 1, 2 * GIB - 1, OutOfRange),
        ((1 << 63) - 1, 0, OutOfRange),
        (1 << 62, 0, ResourceExhausted),
    ],
)
def test_a_growth_that_cannot_be_leaves_everything_as_it_was(required: int, limit: int, error: type[Exception]) -> None:
    backend = MemoryBackend()
    driver = provisioning(backend)
    before = driver.create(request()).record
    with pytest.raises(error):
        driver.expand("pvc-1", required, limit)
    assert backend.records["pvc-1"] == before
    assert backend.sizes["pvc-1"] == GIB + 16 * MIB


def test_a_plain_iv_bounds_growth_by_the_cipher_that_was_written() -> None:
    backend = MemoryBackend()
    driver = provisioning(backend)
    made = driver.create(request()).record
    identity = LuksIdentity(
        uuid="u", cipher="aes-xts-plain", key_bits=512, sector_size=512, data_offset=formats.DATA_OFFSET
    )
    backend.update(msgspec.structs.replace(made, luks=identity, encryption=EncryptionState.ENCRYPTED))
    assert driver.expand("pvc-1", 2 * TIB, 0) == 2 * TIB
    with pytest.raises(OutOfRange, match=r"repeats its IV"):
        driver.expand("pvc-1", 2 * TIB + 512, 0)


@given(st.lists(st.tuples(st.integers(0, 1 << 41), st.integers(0, 1 << 41)), max_size=6))
def test_however_it_is_called_expand_never_shrinks(calls: list[tuple[int, int]]) -> None:
    backend = MemoryBackend()
    driver = provisioning(backend)
    capacity = driver.create(request()).record.capacity_bytes
    for required, limit in calls:
        try:
            found = driver.expand("pvc-1", required, limit)
        except (InvalidArgument, OutOfRange):
            found = capacity
        assert found >= capacity
        capacity = driver.get("pvc-1").record.capacity_bytes
        assert found == capacity
        assert backend.sizes["pvc-1"] == capacity + 16 * MIB


# --- another state directory -----------------------------------------------------------------------------------------


def test_nothing_is_made_enlarged_or_removed_in_another_state_directory() -> None:
    """Its disk was unmounted: a volume that is made below it would be lost, and none there is one that is known."""
    backend = MemoryBackend()
    provisioning(backend).create(request())

    def check() -> None:
        raise FailedPrecondition("another disk")

    elsewhere = Provisioning(Settings(node_id="node-1"), backend, no_images(), check, lambda _: None, no_kms())
    before = dict(backend.records), dict(backend.sizes)
    for change in (
        lambda: elsewhere.create(request("pvc-2")),
        lambda: elsewhere.expand("pvc-1", 2 * GIB, 0),
        lambda: elsewhere.delete("pvc-1"),
    ):
        with pytest.raises(FailedPrecondition, match=r"another disk"):
            change()
    assert (backend.records, backend.sizes) == before
