"""Small texts, and folders of them, for the tests of encoders and builds."""

import os

import numpy as np

WORDS = ["river", "stone", "light", "paper", "wind", "garden", "house", "letter", "winter", "road", "bridge", "voice"]
LETTERS = str.maketrans("0123456789", "abcdefghij")  # digits do not count when chunks are compared
LIMIT = 64  # tokens that the small encoder reads


def paragraph(rng, words=22):
    return " ".join(rng.choice(WORDS) + str(rng.integers(1000)).translate(LETTERS) for _ in range(words)) + "."


def write_folder(folder, articles=24, chunks=9, seed=0, words=22):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for a in range(articles):
        text = "\n\n".join(paragraph(rng, words) for _ in range(chunks + a % 3))
        (folder / f"article {a:03d}.txt").write_text(text + "\n", encoding="utf-8")
    return folder


class Evil:
    """Pickled, it leaves a file HIT where it is loaded."""

    def __reduce__(self):
        return os.system, ("touch HIT",)
