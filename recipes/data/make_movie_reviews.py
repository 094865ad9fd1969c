"""Make movie_reviews.tsv.gz from the source distribution of vaderSentiment 3.3.2.

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
    python make_movie_reviews.py vaderSentiment-3.3.2.tar.gz

Near-neutral sentences (|rating| < 0.5) are dropped. The thousand with the smallest digest of their
text are held out, so the split depends only on the sentences.
"""

import gzip
import hashlib
import io
import sys
import tarfile
from pathlib import Path

SOURCE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
HELD_OUT = 1000


def main(sdist: str) -> None:
    """Read the ratings from the archive inside the archive, and write a compact copy."""
    with tarfile.open(sdist) as outer:
        inner = outer.extractfile(SOURCE)
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            ratings = archive.extractfile(RATINGS)
            assert ratings is not None
            lines = ratings.read().decode().rstrip("\n").split("\n")
    rows: dict[str, float] = {}
    for line in lines:
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= 0.5:
            rows.setdefault(" ".join(text.split()), float(rating))
    order = sorted(rows, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    table = ["split\trating\ttext"]
    for index, text in enumerate(order):
        split = "test" if index < HELD_OUT else "train"
        table.append(f"{split}\t{rows[text]:.2f}\t{text}")
    data = "\n".join(table).encode() + b"\n"
    target = Path(__file__).parent / "movie_reviews.tsv.gz"
    target.write_bytes(gzip.compress(data, 9, mtime=0))
    print(f"{target}: {len(order)} sentences, {HELD_OUT} held out")


if __name__ == "__main__":
    main(sys.argv[1])
