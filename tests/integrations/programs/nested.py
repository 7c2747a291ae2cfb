"""A program made of everything: a start method set once, an initializer, a process that opens a pool of its own."""

import concurrent.futures
import multiprocessing
import sys
from multiprocessing import Pool, Process, SimpleQueue

import numpy as np


class Model:
    """Of __main__: the workers must find it there."""

    def __init__(self, weights):
        self.weights = weights

    def __call__(self, x):
        return Scaled(float((self.weights * x).sum()))


class Scaled:
    def __init__(self, value):
        self.value = value


def initialize(weights):
    global model
    model = Model(weights)


def evaluate(x):
    return model(x)


def evaluate_all(queue, weights):
    with Pool(1, initialize, (weights,)) as pool:
        queue.put([scaled.value for scaled in pool.map(evaluate, range(3))])


if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    weights = np.arange(50_000.0)
    with Pool(2, initialize, (weights,)) as pool:
        scaled = pool.starmap(Model(weights), [(x,) for x in range(4)])
        print([one.value for one in scaled], type(scaled[0]) is Scaled)
        print([pool.apply_async(evaluate, (x,)).get().value for x in (2, 3)])
    queue = SimpleQueue()
    process = Process(target=evaluate_all, args=(queue, weights))
    process.start()
    print(queue.get())
    process.join()
    with concurrent.futures.ProcessPoolExecutor(1) as executor:
        try:
            executor.submit(evaluate, 1).result()
        except NameError as error:
            print("in a worker:", error, "Traceback" in str(error.__cause__))
    print(process.exitcode, multiprocessing.get_start_method(), multiprocessing.active_children())
