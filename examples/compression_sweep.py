"""How little can be sent? The same job with several compressors, and one page that compares them.

    python examples/compression_sweep.py

Eight simulated workers on a slow network. Leaves the runs in runs/ and the page in sweep.html.
"""

import argparse
import subprocess
import sys

import aiosgd

COMPRESSORS = ("none", "fp16", "qsgd(bits=4)", "topk(ratio=0.01)", "ef(topk(ratio=0.01))")


def main():
    """Run the sweep."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=60)
    options = parser.parse_args()
    folders = []
    print(f"{'compressor':22} accuracy  MB sent  virtual s")
    for compressor in COMPRESSORS:
        result = aiosgd.simulate(
            codec="plain",
            compressor=compressor,
            workers=8,
            epochs=options.epochs,
            network="wan",
            optimizer_params={"momentum": 0.9},
            title=compressor.translate(str.maketrans("(=", "--", ")")),
        )
        folders.append(str(result.folder))
        summary = result.summary
        print(
            f"{compressor:22} {result.metrics['accuracy']:8.3f} {summary.bytes_sent / 1e6:8.2f} "
            f"{summary.train_s:10.1f}"
        )
    report = [sys.executable, "-m", "aiosgd", "report", *folders, "--output", "sweep.html"]
    subprocess.run(report, check=True)


if __name__ == "__main__":
    main()
