"""StorageClass parameters and what a secret wishes: read, checked, in agreement."""

import shlex

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.keys.secret import SecretKey, read_secret
from csi_driver.luks import formats
from csi_driver.luks.choice import luks_format
from csi_driver.luks.formats import LuksFormat
from csi_driver.luks.header_rules import DEFAULT_LIMITS
from csi_driver.model.errors import DriverError, FailedPrecondition, InvalidArgument
from csi_driver.model.volume import VolumeParameters
from csi_driver.operator.class_parameters import TAKEN_OVER
from csi_driver.volumes.parameters import (
    _IGNORED,
    _ONE_VALUE,
    _READERS,
    _tell_ignored,
    check_mkfs_options,
    read_parameters,
)
from tests.told_lines import told_lines

NO_KEY = SecretKey(passphrase=None)
KEY = {"CRYPTO_KEY_VALUE": "Simple passphrase"}

# The parameters of the classes that Longhorn, Harvester and Ceph-CSI document, as the provisioner sends them.
LONGHORN = {"numberOfReplicas": "3", "staleReplicaTimeout": "2880", "fromBackup": "", "encrypted": "true"}
HARVESTER = {
    "numberOfReplicas": "2",
    "staleReplicaTimeout": "2880",
    "fromBackup": "",
    "migratable": "true",
    "encrypted": "true",
}
LONGHORNS_OWN = {
    "numberOfReplicas": "3",
    "staleReplicaTimeout": "30",
    "fromBackup": "",
    "fsType": "ext4",
    "dataLocality": "disabled",
    "unmapMarkSnapChainRemoved": "ignored",
    "disableRevisionCounter": "true",
    "dataEngine": "v1",
    "backupTargetName": "default",
}
"""The class `longhorn` that Longhorn's chart makes."""
CEPH = {"clusterID": "rook", "pool": "rbd", "imageFeatures": "layering", "encrypted": "true", "encryptionKMSID": ""}


VALID = [
    ("encrypted", "true", "encrypted", True),
    ("encrypted", "false", "encrypted", False),
    *(("cipher", cipher, "cipher", cipher) for cipher in formats.CIPHER_KEY_BITS),
    ("keySize", "256", "key_bits", 256),
    *(("hash", name, "hash", name) for name in formats.HASHES),
    *(("pbkdf", name, "pbkdf", name) for name in formats.PBKDFS),
    ("pbkdfMemory", "32", "pbkdf_memory_kib", 32),
    ("pbkdfMemory", "4194304", "pbkdf_memory_kib", 4194304),
    ("pbkdfIterations", "4", "pbkdf_iterations", 4),
    ("pbkdfIterations", "10000000", "pbkdf_iterations", 10_000_000),
    *(("sectorSize", str(size), "sector_size", size) for size in formats.SECTOR_SIZES),
    ("encryptionCipher", "aes-xts-plain64", "cipher", "aes-xts-plain64"),
    ("encryptionKeySize", "256", "key_bits", 256),
    ("encryptionSectorSize", "4096", "sector_size", 4096),
    ("discard", "true", "discard", True),
    ("noReadWorkqueue", "true", "no_read_workqueue", True),
    ("noWriteWorkqueue", "true", "no_write_workqueue", True),
    ("backingImage", "debian-12", "backing_image", "debian-12"),
    ("backingImage", "", "backing_image", None),
    ("backingImageDataSourceType", "", "image_source_type", None),
    ("backingImageDataSourceParameters", "", "image_source", {}),
    ("backingImageDataSourceParameters", "{}", "image_source", {}),
    ("backend", "loopfile", "backend", "loopfile"),
    ("thinPool", "thin-pool.1", "thin_pool", "thin-pool.1"),
    ("backingStorageClass", "hcloud-volumes", "backing_storage_class", "hcloud-volumes"),
    ("backingAttach", "direct", "backing_attach", "direct"),
    ("backingAttach", "holder", "backing_attach", "holder"),
    ("numberOfReplicas", "3", "replicas", 3),
    ("fstype", "xfs", "fs_type", "xfs"),
    ("fsType", "btrfs", "fs_type", "btrfs"),
    ("csi.storage.k8s.io/fstype", "ext4", "fs_type", "ext4"),
    (
        "mkfsOptions",
        "-b 4096 -E 'stride=4,stripe_width=8'",
        "mkfs_options",
        ("-b", "4096", "-E", "stride=4,stripe_width=8"),
    ),
    ("mkfsOptions", "", "mkfs_options", ()),
    ("mkfsParams", "-I 256 -O ^metadata_csum,^64bit", "mkfs_options", ("-I", "256", "-O", "^metadata_csum,^64bit")),
]


@pytest.mark.parametrize(("parameter", "text", "field", "value"), VALID)
def test_a_valid_parameter_is_typed(parameter: str, text: str, field: str, value: object) -> None:
    assert read_parameters({parameter: text}) == msgspec.structs.replace(VolumeParameters(), **{field: value})


KEYS = [
    ({"encryptionKMSID": "vault-1"}, {"kms_id": "vault-1"}),
    ({"encryptionKMSID": ""}, {}),
    ({"encryptionKMSID": "default"}, {}),
    ({"generateKey": "true"}, {"generate_key": True}),
    ({"generateKey": "false", "encryptionKMSID": "v"}, {"kms_id": "v"}),
    ({"encryptionKMSID": "v", "keyReclaimPolicy": "Retain"}, {"kms_id": "v", "retain_key": True}),
    ({"generateKey": "true", "keyReclaimPolicy": "Delete"}, {"generate_key": True}),
    ({"eraseOnDelete": "true"}, {"erase_on_delete": True}),
    ({"generateKey": "true", "keyRotationPeriod": "1h"}, {"generate_key": True, "key_rotation_seconds": 3600}),
    ({"encryptionKMSID": "v", "keyRotationPeriod": "90d"}, {"kms_id": "v", "key_rotation_seconds": 90 * 86400}),
    ({"encryptionKMSID": "v", "keyRotationPeriod": "9999w"}, {"kms_id": "v", "key_rotation_seconds": 9999 * 604800}),
]


@pytest.mark.parametrize(("given", "fields"), KEYS)
def test_where_a_key_comes_from(given: dict[str, str], fields: dict[str, object]) -> None:
    found = read_parameters({"encrypted": "true", **given})
    assert found == msgspec.structs.replace(VolumeParameters(encrypted=True), **fields)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"encryptionKMSID": "v"}, "encryptionKMSID means nothing without encrypted"),
        ({"generateKey": "true", "encrypted": "false"}, "generateKey means nothing without encrypted"),
        ({"encrypted": "true", "encryptionKMSID": "v", "generateKey": "true"}, "leave one of them out"),
        ({"eraseOnDelete": "true"}, "eraseOnDelete means nothing without encrypted"),
        ({"encrypted": "true", "keyReclaimPolicy": "Retain"}, "keyReclaimPolicy means nothing"),
        ({"encrypted": "true", "keyRotationPeriod": "90d"}, "nobody makes one for the passphrase of a secret"),
        ({"encrypted": "true", "encryptionKMSID": "default", "keyRotationPeriod": "90d"}, "nobody makes one"),
        ({"keyRotationPeriod": "90d"}, "keyRotationPeriod means nothing without encrypted"),
        (
            {"encrypted": "true", "keyRotationPeriod": "90d", "keyReclaimPolicy": "Retain"},
            "nobody makes one for the passphrase of a secret",
        ),
    ],
)
def test_what_says_two_things_of_a_key_or_nothing_is_refused(given: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        read_parameters(given)


INVALID = [
    *(("encrypted", text) for text in ("", "True", "yes", "1", "on", " true", "true\n")),
    *(("cipher", text) for text in ("", "null", "cipher_null", "cipher_null-ecb", "AES-XTS-PLAIN64", "aes-ecb")),
    *(("keySize", text) for text in ("", "0", "64", "-256", "256.0", "0x100", "٢٥٦", "1024", "9" * 5000)),
    *(("hash", text) for text in ("", "md5", "sha1", "SHA256")),
    *(("pbkdf", text) for text in ("", "argon2", "scrypt", "PBKDF2")),
    *(("pbkdfMemory", text) for text in ("", "31", "4194305", "64Mi", "9" * 5000)),
    *(("pbkdfIterations", text) for text in ("", "3", "10000001", "-1", "1e3", "9" * 5000)),
    *(("sectorSize", text) for text in ("", "0", "256", "0512", "8192")),
    ("backingAttach", "Direct"),
    *(("backingStorageClass", text) for text in ("", "A", "a_b", "-a", "a/b", "a" * 254)),
    *(("thinPool", text) for text in ("", "-x", "a/b", "a" * 65)),
    *((name, "TRUE") for name in ("discard", "eraseOnDelete", "noReadWorkqueue", "noWriteWorkqueue")),
    *(("numberOfReplicas", text) for text in ("", "0", "-1", "21", "three")),
    *((name, "ntfs") for name in ("fstype", "fsType", "csi.storage.k8s.io/fstype")),
    *(("backingImage", text) for text in ("Debian", "../debian", "debian/12", "-debian", "d" * 64)),
    *(("backingImageDataSourceType", text) for text in ("Clone", "http", "clone", "download")),
    *(("backingImageDataSourceParameters", text) for text in ("{", "[]", "null", '{"url": 1}', '{"url": "https:/x"}')),
    ("mkfsOptions", "-b '4096"),
    ("mkfsParams", "-b '4096"),
    *(("encryptionType", text) for text in ("file", "Block", "none")),
    ("integrityMode", "hmac-sha256"),
    *(("encryptionCipher", text) for text in ("", "serpent-xts-plain64", "aes-xts-random")),
    *(("encryptionKeySize", text) for text in ("", "64")),
    *(("encryptionSectorSize", text) for text in ("", "8192")),
    *(("encryptionKMSID", text) for text in ("v" * 254, "vault\n", "\x1b[31m")),
    *(("generateKey", text) for text in ("", "yes")),
    *(("keyReclaimPolicy", text) for text in ("", "retain", "Recycle")),
    *(
        ("keyRotationPeriod", text)
        for text in ("", "0h", "01h", "1", "30m", "3600s", "1y", "1.5d", "-1d", "90D", "10000d")
    ),
    *(("keyRotationPeriod", text) for text in (" 90d", "90d\n", "1d12h", "٩0d", "90 d")),
]


@pytest.mark.parametrize(("parameter", "text"), INVALID)
def test_an_invalid_value_is_refused_and_its_parameter_named(parameter: str, text: str) -> None:
    with pytest.raises(InvalidArgument, match=parameter):
        read_parameters({parameter: text})


def test_an_image_that_is_misnamed_is_looked_for_where_there_are_images() -> None:
    with pytest.raises(InvalidArgument, match=r"as luks-csi image list shows them, or in a cluster kubectl get images"):
        read_parameters({"backingImage": "Debian"})


@pytest.mark.parametrize("text", [text for name, text in INVALID if name == "keyRotationPeriod"])
def test_a_period_that_is_none_is_refused_for_what_it_is(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"it must be 1 to 9999 hours, days or weeks"):
        read_parameters({"encrypted": "true", "generateKey": "true", "keyRotationPeriod": text})


def test_every_parameter_has_a_valid_and_an_invalid_case_here() -> None:
    valid = {case[0] for case in VALID} | {name for given, _ in KEYS for name in given}
    tested = valid & {case[0] for case in INVALID}
    assert set(_READERS) - tested == {"backend"}  # which value is right, the backend knows


def test_without_parameters_nothing_is_chosen() -> None:
    assert read_parameters({}) == VolumeParameters()
    assert luks_format(VolumeParameters(), NO_KEY) == LuksFormat(
        cipher="aes-xts-plain64",
        key_bits=512,
        hash="sha256",
        pbkdf="argon2id",
        memory_kib=64 * 1024,
        iterations=4,
        sector_size=512,
        data_offset=16 << 20,
    )


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("Encrypted", "encrypted"),
        ("encrypt", "encrypted"),
        ("keysize", "keySize"),
        ("pbkdfmemory", "pbkdfMemory"),
        ("numReplicas", "numberOfReplicas"),
        ("mkfsOption", "mkfsOptions"),
        ("fs-type", "fstype"),
        ("staleReplicaTimout", "staleReplicaTimeout"),
        ("fromBackups", "fromBackup"),
    ],
)
def test_an_unknown_parameter_is_refused_and_the_nearest_named(wrong: str, meant: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"parameter '{wrong}' is unknown; did you mean {meant}$"):
        read_parameters({wrong: "x"})


def test_an_unknown_parameter_like_no_other_is_refused_with_those_that_are() -> None:
    with pytest.raises(InvalidArgument, match=r"parameter '42' is unknown; known are backend, .*, mkfsOptions"):
        read_parameters({"42": ""})


@pytest.mark.parametrize("name", sorted(_IGNORED))
def test_parameters_of_other_drivers_are_accepted_and_told_once(name: str) -> None:
    before = read_parameters({})
    with told_lines() as told:
        assert read_parameters({name: "whatever"}) == before
        again = len(told)
        assert read_parameters({name: "something else"}) == before
    assert len(told) == again  # the first line may have been told by an earlier test: once is once per process
    assert all(line.fields["parameter"] == name and line.event == "StorageClass parameter ignored" for line in told)


def test_an_ignored_parameter_is_told() -> None:
    _tell_ignored.cache_clear()
    with told_lines() as told:
        read_parameters(LONGHORN)
        read_parameters(HARVESTER)
    assert [line.fields["parameter"] for line in told] == ["staleReplicaTimeout", "migratable"]


@pytest.mark.parametrize(("given", "replicas"), [(LONGHORN, 3), (HARVESTER, 2), (CEPH, 1)])
def test_the_classes_of_longhorn_and_ceph_apply(given: dict[str, str], replicas: int) -> None:
    fs = {"csi.storage.k8s.io/fstype": "ext4"}
    assert read_parameters(given) == VolumeParameters(encrypted=True, replicas=replicas)
    assert read_parameters(given | fs) == VolumeParameters(encrypted=True, replicas=replicas, fs_type="ext4")
    assert luks_format(read_parameters(given), read_secret(KEY)) == LuksFormat()


def test_what_the_provisioner_adds_is_no_unknown_parameter() -> None:
    found = read_parameters(
        {
            "csi.storage.k8s.io/pvc/name": "data",
            "csi.storage.k8s.io/pvc/namespace": "shop",
            "csi.storage.k8s.io/pv/name": "pvc-1",
            "csi.storage.k8s.io/node-stage-secret-name": "keys",
            "csi.storage.k8s.io/node-expand-secret-namespace": "shop",
        }
    )
    assert found == VolumeParameters(claim="shop/data")


@pytest.mark.parametrize("part", ["name", "namespace"])
@pytest.mark.parametrize(
    "stage",
    [
        "", "provisioner-", "controller-publish-", "controller-expand-", "controller-modify-", "node-stage-",
        "node-publish-", "node-expand-",
    ],
)  # fmt: skip
def test_a_secret_that_the_sidecars_read_is_no_unknown_parameter(stage: str, part: str) -> None:
    assert read_parameters({f"csi.storage.k8s.io/{stage}secret-{part}": "keys"}) == VolumeParameters()


@pytest.mark.parametrize("part", ["Name", "Namespace"])
@pytest.mark.parametrize("stage", ["Provisioner", "ControllerPublish", "NodeStage", "NodePublish"])
def test_a_secret_in_the_old_spelling_is_no_unknown_parameter(stage: str, part: str) -> None:
    assert read_parameters({f"csi{stage}Secret{part}": "keys"}) == VolumeParameters()


def test_the_class_that_longhorn_comes_with_applies() -> None:
    assert read_parameters(LONGHORNS_OWN) == VolumeParameters(replicas=3, fs_type="ext4")


def test_longhorns_example_with_the_second_engine_applies() -> None:
    given = LONGHORNS_OWN | {"dataEngine": "v2", "dataLayout.type": "replicated", "dataLayout.mode": "raid1"}
    assert read_parameters(given) == read_parameters(LONGHORNS_OWN)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("fromBackup", "s3://backups/one", "no backup can be restored; leave it out$"),
        ("recurringJobSelector", '[{"name":"backup"}]', "nothing makes snapshots or backups .* leave it out$"),
        ("backingImageChecksum", "0f", "compared with its checksum when it is imported, .* leave it out$"),
        ("dataLayout.type", "sharded", "has one copy, without parity; make it 'replicated' or leave it out$"),
    ],
)
def test_what_longhorn_would_do_and_nobody_does_here_is_refused_for_that(name: str, text: str, words: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"parameter {name} is .* and .*{words}"):
        read_parameters(LONGHORNS_OWN | {name: text})


def test_what_the_class_of_a_machine_image_takes_over_makes_volumes() -> None:
    given = dict.fromkeys(TAKEN_OVER, "a,b") | {"encrypted": "true", "numberOfReplicas": "2"}
    assert read_parameters(given) == VolumeParameters(encrypted=True, replicas=2)


@pytest.mark.parametrize("text", ["", "block"])
def test_a_block_device_is_what_ceph_csi_encrypts_unless_told(text: str) -> None:
    assert read_parameters(CEPH | {"encryptionType": text, "integrityMode": ""}) == read_parameters(CEPH)


def test_encrypted_files_are_refused_for_what_is_offered() -> None:
    with pytest.raises(InvalidArgument, match=r"is 'file' and it is the device .*LUKS2.*; make it 'block' or leave it"):
        read_parameters(CEPH | {"encryptionType": "file"})
    with pytest.raises(InvalidArgument, match=r"integrityMode is 'hmac-sha512' and .*dm-integrity\); leave it out$"):
        read_parameters(CEPH | {"integrityMode": "hmac-sha512"})


@pytest.mark.parametrize(
    ("one", "other", "values"),
    [
        ("cipher", "encryptionCipher", ("aes-xts-plain64", "aes-xts-plain")),
        ("keySize", "encryptionKeySize", ("512", "256")),
        ("sectorSize", "encryptionSectorSize", ("4096", "512")),
    ],
)
def test_what_ceph_csi_calls_otherwise_is_the_same(one: str, other: str, values: tuple[str, str]) -> None:
    assert read_parameters({one: values[0], other: values[0]}) == read_parameters({one: values[0]})
    with pytest.raises(InvalidArgument, match=rf"{other} says '{values[1]}' and another one says"):
        read_parameters({one: values[0], other: values[1]})


def test_two_spellings_must_agree() -> None:
    assert read_parameters({"fstype": "xfs", "fsType": "xfs"}).fs_type == "xfs"
    with pytest.raises(InvalidArgument, match=r"fsType says 'ext4' and another one says 'xfs'"):
        read_parameters({"fstype": "xfs", "fsType": "ext4"})


# --- the choice for luksFormat -----------------------------------------------------------------------------------


AGREEMENTS = [
    ("cipher", "aes-xts-plain", "CRYPTO_KEY_CIPHER", "aes-cbc-plain", "cipher"),
    ("hash", "sha256", "CRYPTO_KEY_HASH", "sha512", "hash"),
    ("keySize", "512", "CRYPTO_KEY_SIZE", "256", "key_bits"),
    ("pbkdf", "pbkdf2", "CRYPTO_PBKDF", "argon2i", "pbkdf"),
]


@pytest.mark.parametrize(("parameter", "chosen", "entry", "wished", "field"), AGREEMENTS)
def test_parameter_and_secret_must_agree(parameter: str, chosen: str, entry: str, wished: str, field: str) -> None:
    def choose(parameters: dict[str, str], entries: dict[str, str]) -> str:
        return str(getattr(luks_format(read_parameters(parameters), read_secret(entries)), field))

    assert choose({parameter: chosen}, {}) == chosen
    assert choose({}, {entry: wished}) == wished
    assert choose({parameter: chosen}, {entry: chosen}) == chosen
    assert choose({}, {entry: ""}) == str(getattr(LuksFormat(), field))
    with pytest.raises(FailedPrecondition, match=rf"parameter {parameter} is {chosen} .*{entry} is {wished}"):
        choose({parameter: chosen}, {entry: wished})


@pytest.mark.parametrize("entry", [entry for _, _, entry, _, _ in AGREEMENTS])
def test_a_wrong_entry_of_the_secret_is_named_and_never_quoted(entry: str) -> None:
    with pytest.raises(FailedPrecondition, match=entry) as caught:
        luks_format(VolumeParameters(), read_secret({entry: "hunter2-in-the-wrong-place"}))
    assert "hunter2" not in str(caught.value)


def test_parameter_and_secret_complete_each_other() -> None:
    found = luks_format(
        read_parameters({"keySize": "128", "pbkdfIterations": "1000"}),
        read_secret({"CRYPTO_KEY_CIPHER": "aes-cbc-essiv:sha256", "CRYPTO_PBKDF": "pbkdf2"}),
    )
    assert (found.cipher, found.key_bits, found.pbkdf, found.iterations, found.memory_kib) == (
        "aes-cbc-essiv:sha256",
        128,
        "pbkdf2",
        1000,
        0,
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"cipher": "aes-cbc-plain64", "keySize": "512"}, "no 512-bit key; choose one of 128, 192, 256"),
        ({"keySize": "128"}, "no 128-bit key"),
        ({"keySize": "300"}, "no 300-bit key"),
        ({"pbkdf": "pbkdf2", "pbkdfIterations": "999"}, "from 1000 to 10000000"),
        ({"pbkdfIterations": "65"}, "with argon2id it must be from 4 to 64"),
        ({"pbkdf": "pbkdf2", "pbkdfMemory": "1024"}, "pbkdfMemory means nothing with pbkdf2"),
    ],
)
def test_what_does_not_fit_together_is_refused(given: dict[str, str], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        luks_format(read_parameters(given), NO_KEY)


@pytest.mark.parametrize(
    ("given", "wishes", "said"),
    [
        ({"keySize": "512"}, {"CRYPTO_KEY_CIPHER": "aes-cbc-plain64"}, "no 512-bit key"),
        ({}, {"CRYPTO_KEY_SIZE": "128"}, "no 128-bit key"),
        ({"pbkdfIterations": "999"}, {"CRYPTO_PBKDF": "pbkdf2"}, "from 1000 to 10000000"),
        ({"pbkdfMemory": "1024"}, {"CRYPTO_PBKDF": "pbkdf2"}, "pbkdfMemory means nothing with pbkdf2"),
    ],
)
def test_a_wish_that_does_not_fit_can_be_put_right_in_the_secret(
    given: dict[str, str], wishes: dict[str, str], said: str
) -> None:
    with pytest.raises(FailedPrecondition, match=f"{said}.*; the secret's wishes count here too"):
        luks_format(read_parameters(given), read_secret(wishes))


def test_what_may_be_asked_for_can_be_opened_again() -> None:
    """A header that costs more than the header rules allow would be written and never opened."""
    for pbkdf, iterations in (("pbkdf2", formats.PBKDF2_MOST_ITERATIONS), ("argon2id", formats.ARGON2_MOST_TIME)):
        given = {"pbkdf": pbkdf, "pbkdfIterations": str(iterations)}
        assert luks_format(read_parameters(given), NO_KEY).iterations == iterations
        with pytest.raises(InvalidArgument):
            luks_format(read_parameters(given | {"pbkdfIterations": str(iterations + 1)}), NO_KEY)
    assert DEFAULT_LIMITS.iterations >= formats.PBKDF2_MOST_ITERATIONS
    assert DEFAULT_LIMITS.time >= formats.ARGON2_MOST_TIME


def test_pbkdf_memory_stays_within_the_limit_of_the_smallest_node() -> None:
    limit = 32 * 1024
    assert luks_format(VolumeParameters(), NO_KEY, limit).memory_kib == limit
    assert luks_format(VolumeParameters(), NO_KEY, 1 << 20).memory_kib == formats.ARGON2_DEFAULT_MEMORY_KIB
    assert luks_format(VolumeParameters(pbkdf_memory_kib=limit), NO_KEY, limit).memory_kib == limit
    with pytest.raises(FailedPrecondition, match=r"pbkdfMemory is 32769 KiB and this driver allows 32768 KiB"):
        luks_format(VolumeParameters(pbkdf_memory_kib=limit + 1), NO_KEY, limit)


def test_pbkdf2_costs_what_its_hash_needs() -> None:
    assert luks_format(read_parameters({"pbkdf": "pbkdf2"}), NO_KEY).iterations == 600_000
    assert luks_format(read_parameters({"pbkdf": "pbkdf2", "hash": "sha512"}), NO_KEY).iterations == 210_000


@pytest.mark.parametrize("cipher", [cipher for cipher in formats.CIPHER_KEY_BITS if cipher.endswith("-plain")])
def test_a_plain_iv_is_not_repeated(cipher: str) -> None:
    formats.check_capacity(cipher, 2 << 40)
    with pytest.raises(DriverError, match=r"repeats its IV"):
        formats.check_capacity(cipher, (2 << 40) + 512)
    formats.check_capacity(f"{cipher}64", 1 << 60)


# --- mkfsOptions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fs_type", "options"),
    [
        ("ext4", "-b 4096 -i 16384 -I 256 -N 1000 -m 1 -O ^resize_inode,metadata_csum -T largefile4 -J size=64"),
        ("ext4", "-E stride=16,stripe_width=32,hash_seed=6f1c2b1e-0a55-4c3e-9d3c-5a3c8b0f7d21 -g 8192 -G 16"),
        ("xfs", "-b size=4096 -m reflink=1,rmapbt=0 -n size=8192 -i maxpct=5 -s size=512 -d su=64k,sw=4 -l size=64m"),
        ("btrfs", "-n 16384 -s 4096 -m dup -d single -O ^no-holes --csum xxhash --checksum sha256"),
    ],
)
def test_options_that_shape_the_file_system_are_taken(fs_type: str, options: str) -> None:
    found = read_parameters({"fstype": fs_type, "mkfsOptions": options})
    assert found.mkfs_options == tuple(options.split())
    check_mkfs_options(fs_type, found.mkfs_options)


@pytest.mark.parametrize(
    ("fs_type", "options"),
    [
        # another device, file or folder
        ("ext4", "-d /etc"),
        ("ext4", "-J device=/dev/sda"),
        ("ext4", "-J size=64,device=UUID=x"),
        ("ext4", "-E stride=4,offset=512"),
        ("ext4", "-E root_owner=0:0"),
        ("ext4", "-z /tmp/undo"),
        ("ext4", "-l /tmp/bad-blocks"),
        ("ext4", "-O /dev/sda"),
        ("xfs", "-l logdev=/dev/sda"),
        ("xfs", "-l size=64m,logdev=/dev/sda"),
        ("xfs", "-l name=/dev/sda"),
        ("xfs", "-l file=1"),
        ("xfs", "-d name=/dev/sda"),
        ("xfs", "-d file=1,size=1g"),
        ("xfs", "-r rtdev=/dev/sda"),
        ("xfs", "-p /etc/protofile"),
        ("xfs", "-c options=/etc/config"),
        ("xfs", "-m uuid=/dev/sda"),
        ("btrfs", "-r /etc"),
        ("btrfs", "--rootdir /etc"),
        ("btrfs", "-M /dev/sda"),
        ("btrfs", "-n 16384 /dev/sda"),
        ("btrfs", "-M loop0"),
        ("ext4", "/dev/sda"),
        ("ext4", "-b /dev/sda"),
        ("ext4", "-b 4096 1024"),
        ("xfs", "-- /dev/sda"),
        # success without a file system
        ("ext4", "-n"),
        ("ext4", "-n 1"),
        ("xfs", "-N"),
        ("ext4", "-V"),
        ("btrfs", "-V"),
        ("btrfs", "--help"),
        ("btrfs", "-O list-all"),
        ("ext4", "-O journal_dev"),
        ("ext4", "-O ^resize_inode,journal_dev"),
        # ext4 without a journal
        ("ext4", "-b 65536"),
        ("ext4", "-b 8k"),
        ("ext4", "-O ^has_journal"),
        ("ext4", "-O metadata_csum,-Has_Journal"),
        ("ext4", "-O none"),
        ("ext4", "-O Clear,extents"),
        ("ext4", "-O ^FEATURE_C2"),
        ("ext4", "-O ^FEATURE_C+02"),
        # spellings of the same
        ("ext4", "-b4096"),
        ("ext4", "-Jdevice=/dev/sda"),
        ("btrfs", "--csum=xxhash"),
        ("ext4", "-b"),
        ("ext4", "-b ''"),
        ("ext4", "-b -n"),
        ("ext4", "'-b 4096'"),
        ("ext4", "-b '40 96'"),
        ("ext4", "-b 40\x0096"),
        ("ext4", "-E ''"),
        ("ext4", "-E stride=4,"),
        ("xfs", "-d ,agcount=4"),
    ],
)
def test_options_that_do_anything_else_are_refused(fs_type: str, options: str) -> None:
    with pytest.raises(InvalidArgument, match=r"mkfsOptions"):
        read_parameters({"fstype": fs_type, "mkfsOptions": options})
    with pytest.raises(InvalidArgument, match=r"mkfsOptions"):
        check_mkfs_options(fs_type, shlex.split(options))


def test_options_are_held_against_the_file_system_that_the_capability_brings() -> None:
    """A provisioner takes csi.storage.k8s.io/fstype out of the parameters: which one it is shows later."""
    found = read_parameters({"mkfsOptions": "-d agcount=4"})
    check_mkfs_options("xfs", found.mkfs_options)
    with pytest.raises(InvalidArgument, match=r"mkfs.ext4"):
        check_mkfs_options("ext4", found.mkfs_options)


# --- nothing but our own errors --------------------------------------------------------------------------------------


NAMES = st.sampled_from([*_READERS, *_IGNORED, *_ONE_VALUE]) | st.text(max_size=20)
ENTRIES = st.sampled_from(
    ["CRYPTO_KEY_VALUE", "encryptionPassphrase", "CRYPTO_KEY_PROVIDER", *(entry for _, _, entry, _, _ in AGREEMENTS)]
)
FLAGS = st.sampled_from(
    ["-b", "-E", "-J", "-d", "-l", "-O", "-M", "-n", "--csum", "-o", "4096", "size=1", "''", "'", "\\"]
)
TEXTS = (
    st.text(max_size=30)
    | st.sampled_from(["true", "false", "", "4096", "xfs", "ext4", "btrfs", "pbkdf2", *formats.CIPHER_KEY_BITS])
    | st.integers().map(str)
    | st.lists(FLAGS, max_size=6).map(" ".join)
)  # fmt: skip


@given(
    st.dictionaries(NAMES, TEXTS, max_size=6),
    st.dictionaries(ENTRIES, TEXTS, max_size=4),
    st.none() | st.integers(32, 1 << 22),
)  # fmt: skip
def test_no_input_raises_anything_but_our_own_errors(
    parameters: dict[str, str], entries: dict[str, str], limit: int | None
) -> None:
    try:
        read = read_parameters(parameters)
        chosen = luks_format(read, read_secret(entries), limit)
        check_mkfs_options(read.fs_type or "ext4", read.mkfs_options)
    except DriverError as error:
        said = str(error)
    else:
        said = ""
        _check_chosen(read, chosen, limit)
    assert "\n" not in said


def _check_chosen(read: VolumeParameters, chosen: LuksFormat, limit: int | None) -> None:
    assert chosen.key_bits in formats.CIPHER_KEY_BITS[chosen.cipher]
    assert chosen.memory_kib <= (limit or 1 << 22)
    assert not any("/" in word for word in read.mkfs_options)
