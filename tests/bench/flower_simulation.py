"""The peer of simulation.py: rounds of Flower's simulation engine with a fit that does nothing.

python flower_simulation.py CLIENTS ROUNDS   prints the seconds of the rounds after the first
"""

import itertools
import json
import sys
import time

import numpy as np
from flwr.client import ClientApp, NumPyClient
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.simulation import run_simulation

CLIENTS, ROUNDS = int(sys.argv[1]), int(sys.argv[2])
ENDS = []


class Client(NumPyClient):
    def fit(self, parameters, config):
        return parameters, 1, {}


class Timed(FedAvg):
    def aggregate_fit(self, server_round, results, failures):
        assert len(results) == CLIENTS, failures
        averaged = super().aggregate_fit(server_round, results, failures)
        ENDS.append(time.perf_counter())
        return averaged


def server(context):
    strategy = Timed(
        fraction_fit=1.0,
        fraction_evaluate=0.0,
        min_fit_clients=CLIENTS,
        min_available_clients=CLIENTS,
        initial_parameters=ndarrays_to_parameters([np.zeros(100, np.float32)]),
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=ROUNDS))


run_simulation(
    server_app=ServerApp(server_fn=server),
    client_app=ClientApp(client_fn=lambda context: Client().to_client()),
    num_supernodes=CLIENTS,
    backend_config={"client_resources": {"num_cpus": 1}},
)
print(json.dumps({"rounds": [b - a for a, b in itertools.pairwise(ENDS)]}), flush=True)
