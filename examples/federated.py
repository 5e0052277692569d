"""Federated learning where each client has a few digits only: three codecs beside each other.

    python examples/federated.py
    python examples/federated.py --epochs 40 --plot federated.png      # needs matplotlib

Ten simulated clients, their samples drawn by label (Dirichlet 0.1). All three send the model once
per turn of local steps; scaffold corrects for what a client's own data pull it towards, fedprox
ties it to the server's model.
"""

import argparse

import aiosgd

CODECS = {"fedavg": {}, "fedprox": {"mu": 0.1}, "scaffold": {}}


def train(codec, params, epochs):
    """Return a simulated run of ten clients."""
    return aiosgd.simulate(
        codec=codec,
        codec_params={"turn": 20, **params},
        workers=10,
        batch_size=32,
        epochs=epochs,
        learning_rate=0.1,
        partition="dirichlet",
        partition_params={"alpha": 0.1},
        title=codec,
    )


def plot(results, path):
    """Draw the mean test accuracy over the epochs."""
    import matplotlib.pyplot as plt

    for name, result in results.items():
        epochs = range(int(result.eval["epoch"].max()) + 1)
        rows = [result.eval[result.eval["epoch"] == epoch]["accuracy"] for epoch in epochs]
        plt.plot(epochs, [row.mean() for row in rows], label=name)
    plt.xlabel("epoch")
    plt.ylabel("test accuracy, mean over clients")
    plt.legend()
    plt.savefig(path)


def main():
    """Train with each codec and print what became of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--plot")
    options = parser.parse_args()
    results = {name: train(name, params, options.epochs) for name, params in CODECS.items()}
    for name, result in results.items():
        sent = result.summary.bytes_sent / 1e6
        print(f"{name:10} accuracy {result.metrics['accuracy']:.3f}, {sent:.1f} MB sent")
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
