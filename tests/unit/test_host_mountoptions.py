import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.host.mountoptions import parse_options
from csi_driver.model.errors import InvalidArgument

MS_RDONLY, MS_NOSUID, MS_NOEXEC, MS_SYNCHRONOUS, MS_NOATIME, MS_LAZYTIME = 1, 2, 8, 16, 1024, 1 << 25


def test_no_options_mean_nothing() -> None:
    options = parse_options([])
    assert (options.flags, options.data, options.per_mount, options.canonical) == (0, "", 0, ())


def test_flags_and_data_are_told_apart() -> None:
    options = parse_options(["ro", "nosuid", "noexec", "noatime", "lazytime", "sync", "commit=5", "discard"], "ext4")
    assert options.flags == MS_RDONLY | MS_NOSUID | MS_NOEXEC | MS_NOATIME | MS_LAZYTIME | MS_SYNCHRONOUS
    assert options.per_mount == MS_RDONLY | MS_NOSUID | MS_NOEXEC | MS_NOATIME
    assert options.data == "commit=5,discard"
    assert options.read_only


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["noatime", "ro"], ["ro", "noatime", "ro"]),
        (["defaults", "rw", "_netdev"], []),
        (["relatime"], []),
        (["discard", "commit=9"], ["commit=9", "discard"]),
        (['context="system_u:object_r:t:s0:c1,c2"'], ["context=system_u:object_r:t:s0:c1,c2"]),
    ],
)
def test_what_means_the_same_compares_equal(one: list[str], other: list[str]) -> None:
    assert parse_options(one) == parse_options(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [(["ro"], []), (["noatime"], ["nodiratime"]), (["commit=5"], ["commit=6"]), (["discard"], ["nodiscard"])],
)
def test_what_differs_compares_unequal(one: list[str], other: list[str]) -> None:
    assert parse_options(one).canonical != parse_options(other).canonical


def test_a_context_reaches_the_kernel_in_quotes_with_its_commas() -> None:
    label = "system_u:object_r:container_file_t:s0:c10,c20"
    assert parse_options([f'context="{label}"', "nouuid"], "xfs").data == f'context="{label}",nouuid'
    assert parse_options([f"context={label}"]).data == f'context="{label}"'


@pytest.mark.parametrize(
    "option",
    [
        "nobarrier", "barrier=0", "data=writeback", "errors=continue", "errors=panic", "commit=0", "commit=301",
        "commit=5,exec", "commit=-1", "commit", "logbufs=9", "compress=zstd:16", "compress=zstd,ssd", "space_cache=v1",
        "discard=later", "suid", "dev", "bind", "remount", "loop", "x-systemd.automount", "noatime,ro", "ro=1", "", "=",
        "ro\0", "ro\n", "commit=5\n", "context=", 'context="', 'context=a"b', 'context="a",ro,context="b"', "context",
        "context=a\n", "context=a b", "subvol=/other", "journal_dev=8:1", "logdev=/dev/sda", "rtdev=/dev/sda", "Ro",
    ],
)  # fmt: skip
def test_everything_else_is_refused(option: str) -> None:
    with pytest.raises(InvalidArgument, match="mount option"):
        parse_options([option])


@pytest.mark.parametrize(
    ("option", "nearest"),
    [("noatme", "noatime"), ("nobarrier", "barrier"), ("comit=5", "commit="), ("nouid", "nouuid")],
)
def test_the_refusal_names_the_option_and_the_nearest(option: str, nearest: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"'{option}' is not allowed, did you mean '{nearest}'\?.*strictatime"):
        parse_options([option])


def test_a_wrong_value_is_told_with_the_right_ones() -> None:
    with pytest.raises(InvalidArgument, match=r"'data=writeback' has a wrong value: data= takes ordered or journal"):
        parse_options(["data=writeback"])
    with pytest.raises(InvalidArgument, match=r"'commit' needs a value: 1 to 300 seconds"):
        parse_options(["commit"])


@pytest.mark.parametrize(
    ("option", "good", "bad"),
    [
        ("nouuid", "xfs", "ext4"),
        ("data=ordered", "ext4", "xfs"),
        ("compress=zstd:3", "btrfs", "ext4"),
        ("space_cache=v2", "btrfs", "xfs"),
        ("commit=5", "btrfs", "xfs"),
    ],
)
def test_an_option_of_another_file_system_is_refused(option: str, good: str, bad: str) -> None:
    assert parse_options([option], good).data == option
    with pytest.raises(InvalidArgument, match=f"does not exist for {bad}, only for .*{good}"):
        parse_options([option], bad)


@pytest.mark.parametrize("pair", [["ro", "rw"], ["noatime", "relatime"], ["discard", "nodiscard"]])
def test_options_that_exclude_each_other_are_refused(pair: list[str]) -> None:
    with pytest.raises(InvalidArgument, match=f"{pair[0]} and {pair[1]} exclude each other"):
        parse_options(pair)


def test_one_option_with_two_values_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="'commit' is given twice"):
        parse_options(["commit=5", "commit=6"])


@given(st.lists(st.text(max_size=30), max_size=4))
def test_nothing_that_is_accepted_can_carry_a_second_option(options: list[str]) -> None:
    try:
        parsed = parse_options(options)
    except InvalidArgument:
        return
    assert len(parsed.data.split(",") if parsed.data else []) <= len(options)
    assert "\0" not in parsed.data


@pytest.mark.parametrize(
    "options",
    [["context=" + "a" * 4096], ["ro"] * 50_000, ["x" * 900_000], ["context=" + "ä" * 2000], ["context=" + "a" * 3993]],
)
def test_more_than_the_kernel_reads_is_refused_before_anything_else(options: list[str]) -> None:
    with pytest.raises(InvalidArgument, match=r"^the mount options take [0-9]+ bytes; give at most 4000$"):
        parse_options(options)


def test_what_is_not_refused_fits_the_page_that_the_kernel_reads() -> None:
    contexts = [f"{name}={'a' * 980}" for name in ("context", "fscontext", "defcontext", "rootcontext")]
    assert len(f"{parse_options(contexts).data},nouuid") < 4096
