"""The reading of tar headers, compared with Python's tarfile on examples that Hypothesis generates."""

import io
import tarfile
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from m3ae_fast.data.tar import BLOCK, scan_tar

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
KINDS = [tarfile.REGTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE]
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=120)
# long paths, which USTAR splits into two fields
paths = st.lists(st.text("abü.", min_size=20, max_size=60), min_size=2, max_size=5).map("/".join)
names = st.one_of(texts, paths).filter(lambda name: not name.endswith("/"))  # tarfile would read folders
files = st.lists(st.tuples(names, st.integers(0, 1500), st.sampled_from(KINDS)), max_size=6)
relaxed = settings(
    max_examples=40, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(path, members, fmt, sized=False):
    """Write members with different contents; links and folders have none. `sized`: pax records contain their sizes
    too."""
    with tarfile.open(path, "w", format=fmt, encoding="utf-8") as tar:
        for number, (name, size, kind) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "target" * 30 if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            info.size = size if kind in KINDS[:2] else 0
            if sized:
                info.pax_headers = {"size": str(info.size)}
            try:
                tar.addfile(info, io.BytesIO(bytes([number + 1]) * info.size))
            except ValueError:  # a name too long for USTAR
                assume(False)


def listed(path):
    """Return the members that tarfile finds before the first one that it cannot read."""
    found = []
    with suppress(tarfile.TarError), tarfile.open(path, encoding="utf-8", errors="replace") as tar:
        for member in tar:
            if member.isreg():
                found.append((member.name, member.offset_data, member.size))
    return found


@relaxed
@given(files, st.sampled_from(FORMATS))
def test_members_have_the_offsets_found_by_tarfile(tmp_path, members, fmt):
    assume(all(len(name.encode()) < 250 for name, _, _ in members) or fmt != tarfile.USTAR_FORMAT)
    path = tmp_path / "a.tar"
    write(path, members, fmt)
    found, damage = scan_tar(path)
    assert [tuple(member) for member in found] == listed(path)
    has_links = any(kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) for _, _, kind in members)
    assert ("contains links or sparse files" in damage) if has_links else damage is None


@relaxed
@given(files, st.sampled_from(FORMATS), st.data())
def test_a_mutated_tar_is_read_as_by_tarfile_or_reported_as_damaged(tmp_path, members, fmt, data):
    """Any bytes of headers are changed, with or without corrected checksums, or the end is cut off."""
    path = tmp_path / "a.tar"
    write(path, members, fmt)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        block = BLOCK * data.draw(st.integers(0, min(12, len(content) // BLOCK - 1)))
        place = block + data.draw(st.one_of(st.integers(0, BLOCK - 1), st.integers(124, 135), st.just(156)))
        content[place] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b"0123456789xgLK\0 \x80\xff")))
        if data.draw(st.booleans()):
            header = content[block : block + BLOCK]
            header[148:156] = b" " * 8
            content[block + 148 : block + 156] = b"%06o\0 " % sum(header)
    del content[data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content)))) :]
    path.write_bytes(content)
    found, damage = scan_tar(path)
    ends = [member.offset + member.size for member in found]
    assert all(member.offset % BLOCK == 0 and member.size >= 0 for member in found)
    assert ends[:-1] == sorted(ends[:-1]) and (damage is not None or max(ends, default=0) <= len(content))
    if damage is None:
        # tarfile finds fewer members if, for example, a mode is not a number
        theirs = [member[1:] for member in listed(path)]
        assert [member[1:] for member in found][: len(theirs)] == theirs


@relaxed
@given(files.filter(bool), st.sampled_from(FORMATS), st.data())
def test_sizes_and_member_types_are_interpreted_as_by_tarfile(tmp_path, members, fmt, data):
    """The members may include a link whose header has a size, and a member whose size differs from the size in its
    record. If the scan reports no damage, both readers find the same members."""
    path = tmp_path / "a.tar"
    write(path, members, fmt, sized=fmt == tarfile.PAX_FORMAT and data.draw(st.booleans()))
    content = bytearray(path.read_bytes())
    with tarfile.open(path, encoding="utf-8") as tar:
        headers = [member.offset_data - BLOCK for member in tar]
    for start in data.draw(st.lists(st.sampled_from(headers), min_size=1, max_size=3)):
        header = content[start : start + BLOCK]
        header[124:136] = b"%011o\0" % data.draw(st.integers(0, 1500))
        header[156:157] = data.draw(st.sampled_from(KINDS))
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        content[start : start + BLOCK] = header
    path.write_bytes(content)
    found, damage = scan_tar(path)
    if damage is None:
        # a directory that was changed to a file keeps its slash, which tarfile removes in some formats
        without_slash = [[(name.rstrip("/"), *more) for name, *more in each] for each in (found, listed(path))]
        assert without_slash[0] == without_slash[1]


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_reference_listing_contains_the_written_members(tmp_path, fmt):
    """This test compares with known members; in the tests above, both readers could make the same mistake."""
    write(tmp_path / "a.tar", [("a.jpg", 700, b"0"), ("d", 0, b"5"), ("b.txt", 3, b"0")], fmt)
    assert [(name, size) for name, _, size in listed(tmp_path / "a.tar")] == [("a.jpg", 700), ("b.txt", 3)]


def by_hand(name, data, fields=(), fmt=tarfile.USTAR_FORMAT, checksum="%06o\0 "):
    """Return a tar member with `fields` written into its header at their offsets, and its checksum in the given
    format."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    header = bytearray(info.tobuf(fmt))
    for start, value in fields:
        header[start : start + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = (checksum % sum(header)).encode()
    return bytes(header) + data + b"\0" * (-len(data) % BLOCK)


def scanned(path, *members):
    path.write_bytes(b"".join(members) + b"\0" * 2 * BLOCK)
    found, damage = scan_tar(path)
    return [(member.name, member.size) for member in found], damage


LAST = by_hand("b.txt", b"dog")


@pytest.mark.parametrize("checksum", ["%06o\0 ", "%07o\0", "%7o ", "%06o \0", " %06o\0"])
def test_checksums_in_several_notations_are_accepted(tmp_path, checksum):
    assert scanned(tmp_path / "a.tar", by_hand("a.txt", b"cat", checksum=checksum), LAST) == (
        [("a.txt", 3), ("b.txt", 3)],
        None,
    )
    wrong = bytearray(by_hand("a.txt", b"cat", checksum=checksum))
    wrong[0] += 1
    assert scanned(tmp_path / "a.tar", bytes(wrong), LAST) == ([], "has no tar header at byte 0")


def test_binary_sizes_use_all_their_bytes(tmp_path):
    """GNU tar writes sizes of 8 GiB and more in binary. Here, the size is 700, so that the test is small."""
    size = b"\x80" + (700).to_bytes(11, "big")
    assert scanned(tmp_path / "a.tar", by_hand("a.txt", b"c" * 700, [(124, size)]), LAST) == (
        [("a.txt", 700), ("b.txt", 3)],
        None,
    )
    for huge in (b"\x81" + size[1:], b"\x80\x01" + size[2:], b"\xff" * 12):
        found = scanned(tmp_path / "a.tar", by_hand("a.txt", b"c" * 700, [(124, huge)]), LAST)
        assert found == ([], "has no tar header at byte 0")


def test_a_pax_record_applies_only_to_the_next_member(tmp_path):
    records = by_hand("pax", b"12 size=700\n18 path=sky/a.txt\n", [(156, b"x")])
    first = by_hand("a.txt", b"c" * 700, [(124, b"%011o\0" % 3)])
    assert scanned(tmp_path / "a.tar", records, first, LAST) == ([("sky/a.txt", 700), ("b.txt", 3)], None)


def test_the_prefix_field_of_a_header_is_part_of_the_name(tmp_path):
    """In GNU tar's format, this field contains times, which are not part of the name."""
    times = [(345, b"14601234567\0")]
    for fmt, name in ((tarfile.USTAR_FORMAT, "14601234567/a.txt"), (tarfile.GNU_FORMAT, "a.txt")):
        found = scanned(tmp_path / "a.tar", by_hand("a.txt", b"cat", times, fmt), LAST)
        assert found == ([(name, 3), ("b.txt", 3)], None)
