"""What float16 costs the Hopper kernels' inverse, in numpy: relative errors against float64, worst of 20 draws.

    python kernels/benchmarks/inverse_precision.py

Unit keys with a pairwise correlation, chunks of 64; diagonal blocks of 16 exact, two merges with operands in float16,
the result in bfloat16, as in prepare.py. Beside it the exact inverse rounded to bfloat16.
"""

import ml_dtypes
import numpy as np

CHUNK, BLOCK, WIDTH, DRAWS = 64, 16, 128, 20
BETAS = {"1": (1.0, 1.0), "up to 1": (0.0, 1.0), "up to 2": (0.0, 2.0), "2": (2.0, 2.0)}


def half(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float32)


def merged(strict: np.ndarray) -> np.ndarray:
    inverse = np.zeros((CHUNK, CHUNK), np.float32)
    for start in range(0, CHUNK, BLOCK):
        part = slice(start, start + BLOCK)
        inverse[part, part] = np.linalg.inv(np.eye(BLOCK) + strict[part, part])
    row, column = np.indices((CHUNK, CHUNK))
    for size in (16, 32):
        joins = (row > column) & (row ^ column >= size) & (row ^ column < 2 * size)
        below = np.where(joins, half(inverse) @ half(strict), 0)
        inverse = inverse - half(below) @ half(inverse)
    return inverse


def main() -> None:
    rng = np.random.default_rng(0)
    for correlation in (0, 0.5, 0.9, 0.99):
        for name, (least, most) in BETAS.items():
            errors = []
            for _ in range(DRAWS):
                keys = np.sqrt(1 - correlation) * rng.normal(size=(CHUNK, WIDTH))
                keys += np.sqrt(correlation) * rng.normal(size=WIDTH)
                keys /= np.linalg.norm(keys, axis=1, keepdims=True)
                strict = np.tril(rng.uniform(least, most, size=(CHUNK, 1)) * (keys @ keys.T), -1)
                exact = np.linalg.inv(np.eye(CHUNK) + strict)
                rounded = [x.astype(ml_dtypes.bfloat16).astype(float) for x in (merged(strict), exact)]
                errors.append([np.linalg.norm(x - exact) / np.linalg.norm(exact) for x in rounded])
            ours, rounding = np.max(errors, axis=0)
            print(f"correlation {correlation}, beta {name}: {ours:.1e}, rounding alone {rounding:.1e}")


if __name__ == "__main__":
    main()
