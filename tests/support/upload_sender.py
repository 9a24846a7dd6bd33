"""Run as a program: sends made-up uploads to a folder, each from where it broke off, until somebody kills it.

Says a line after each piece, so that whoever started it can choose the moment.
"""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

from support.uploading import contents, manifest_of, pieces

from gralora_runtime.adapters.catalogue.uploads import UploadLimits, Uploads


def main(folder: Path) -> None:
    uploads = Uploads(folder, limits=UploadLimits(), in_use=lambda _: False)
    for seed in count():
        files = contents(seed, 20_000)
        manifest = manifest_of(f"n{seed}", files)
        if uploads.find(manifest.name) is not None:
            continue
        upload = uploads.begin(manifest)
        for piece in pieces(files, uploads.received(manifest)):
            upload.write(*piece)
            print("piece", flush=True)
        upload.finish()
        print("whole", flush=True)
        upload.close()
        uploads.accept(manifest)
        print("accepted", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
