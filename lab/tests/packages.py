"""Stand-ins for the emoji packages of npm."""

import io
import json
import tarfile

from tests.helpers.shards import picture


def tar_of(files, mode):
    """Return a tar with these files, given as bytes by name."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def emoji(number, tones=(), vendors=("twitter", "google")):
    """Return the row of an emoji for emoji.json, the table of a package."""
    code = f"1F{number:03X}"
    row = {"name": f"FACE {number}", "short_names": [f"face_{number}", f"smile_{number}"], "unified": code,
           "category": ("Smileys", "Animals", "Flags")[number % 3], "subcategory": f"sub-{number % 7}"}  # fmt: skip
    drawn = {f"has_img_{vendor}": vendor in vendors for vendor in ("twitter", "google")}
    row |= drawn | {"image": f"{code.lower()}.png"}
    if tones:
        row["skin_variations"] = {t: drawn | {"image": f"{code.lower()}-{t.lower()}.png"} for t in tones}
    return row


def npm_package(path, vendor, table, draw=lambda number: picture(number, (64, 64), fmt="PNG")):
    """Write emoji-datasource-VENDOR with the emoji of a table. `draw`: function that returns the image with a
    number."""
    images = [row["image"] for emoji in table for row in (emoji, *emoji.get("skin_variations", {}).values())]
    files = {f"package/img/{vendor}/64/{name}": draw(i) for i, name in enumerate(images)}
    files["package/emoji.json"] = json.dumps(table).encode()
    path.write_bytes(tar_of(files, "w:gz"))
    return path
