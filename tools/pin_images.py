"""Writes the digests of other people's images where they are named: `name:tag` becomes `name:tag@sha256:...`.

An image is named by `ARG ..._IMAGE=` in the Dockerfile and by `image:` or `imageName:` in what is deployed. A digest is
the registry's answer for the tag at this moment, so a second run moves the pins to what the tags mean by then. Either
all are written or none: a file changes only when every registry has answered.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

# Each asks a registry for the digest of a tag: of its index, where it has images for several platforms.
_CLIENTS: tuple[tuple[str, ...], ...] = (
    ("skopeo", "inspect", "--no-tags", "--format", "{{.Digest}}", "docker://{}"),
    ("crane", "digest", "{}"),
    ("docker", "buildx", "imagetools", "inspect", "--format", "{{.Manifest.Digest}}", "{}"),
)
_TIMEOUT = 60.0

_NAMED = re.compile(
    r"""(?mx)
    ^(?P<before> ARG\ [A-Z_]+_IMAGE= | \s*(?:-\ )?(?:image|imageName):\ +"? )
    (?P<image> [a-z0-9][\w./:-]*:[\w][\w.-]* )
    (?:@sha256:[0-9a-f]{64})?
    (?P<after> "?\ *(?:\#.*)? )$
    """
)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class UnansweredError(Exception):
    """A digest could not be had; the message says of which image, and why."""


def images(text: str, own: str) -> list[str]:
    """The images that a file names, in its order, but for one's own."""
    return [match["image"] for match in _NAMED.finditer(text) if _name(match["image"]) != own]


def pinned(text: str, digests: Mapping[str, str]) -> str:
    """The text with these digests behind the images that they are of."""

    def write(match: re.Match[str]) -> str:
        image = match["image"]
        return f"{match['before']}{image}@{digests[image]}{match['after']}" if image in digests else match[0]

    return _NAMED.sub(write, text)


def _name(image: str) -> str:
    return image.rpartition(":")[0].rpartition("/")[2]


def client() -> tuple[str, ...]:
    """The first client that is installed and works. Raises UnansweredError if none does."""
    for command in _CLIENTS:
        if shutil.which(command[0]) and _answers(*command[: 2 if "buildx" in command else 1], "--help"):
            return command
    raise UnansweredError("no client of registries: install skopeo, crane, or docker with buildx")


def _answers(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0  # noqa: S603 - of our table


def ask(image: str) -> str:
    """The digest of a tag. Raises UnansweredError."""
    command = [part.format(image) if part.endswith("{}") else part for part in client()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT)  # noqa: S603
    except subprocess.TimeoutExpired:
        raise UnansweredError(f"{image}: no answer of its registry within {_TIMEOUT:g} s") from None
    if done.returncode != 0 or not _DIGEST.fullmatch(done.stdout.strip()):
        reason = (done.stderr or done.stdout).strip().splitlines() or ["no digest"]
        raise UnansweredError(f"{image}: {command[0]} got no digest of it: {reason[-1]}")
    return done.stdout.strip()


def pin(paths: Iterable[Path], own: str, digest_of: Callable[[str], str] = ask) -> dict[str, str]:
    """Pins every image that the files name; returns the digests. Raises UnansweredError with nothing changed."""
    texts = {path: path.read_text() for path in paths}
    named = sorted({image for text in texts.values() for image in images(text, own)})
    digests = {image: digest_of(image) for image in named}
    for path, text in texts.items():
        if (now := pinned(text, digests)) != text:
            path.write_text(now)
    return digests


def main() -> int:
    """Exit codes: 0 pinned, 1 a registry or a client is missing, 2 wrong arguments."""
    parser = argparse.ArgumentParser(prog="python -m tools.pin_images", description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, help="files, or folders of YAML files")
    parser.add_argument("--own", default="tidings", help="the image of this repository, which is built and not pinned")
    asked = parser.parse_args()
    files = [file for path in asked.paths for file in (sorted(path.rglob("*.yaml")) if path.is_dir() else [path])]
    try:
        digests = pin(files, asked.own)
    except UnansweredError as error:
        print(f"error: {error}; nothing was changed", file=sys.stderr)
        return 1
    for image, digest in digests.items():
        print(f"{image}@{digest}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
