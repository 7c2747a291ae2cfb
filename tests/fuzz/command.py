"""``python -m tests.fuzz``: rounds of misdeeds, for as long as one likes."""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import secrets
import time
import traceback
from collections import Counter
from collections.abc import Sequence

import psutil
from support import TIMEUNIT

from .misdeeds import MISDEEDS
from .rounds import rounds

#: So many rounds on one executor.
_ROUNDS = 40


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if nobody but the tasks that misbehaved has suffered."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=None, help="to repeat a run")
    parser.add_argument("--method", choices=["fork", "forkserver", "spawn", "loky"], default="fork")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--misdeed", action="append", choices=sorted(MISDEEDS), help="only these")
    options = parser.parse_args(arguments)
    os.environ.setdefault("SHMPOOL_VERIFY", "1")
    seed = secrets.randbits(32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    rng = random.Random(seed)
    names = options.misdeed or list(MISDEEDS)
    until = time.monotonic() + 60 * options.minutes
    fates: Counter[str] = Counter()
    played = deaths = failures = 0
    me = psutil.Process()
    before: list[int] = []
    while time.monotonic() < until and failures < 5:
        name, number = "", -1
        faulthandler.dump_traceback_later(600 * TIMEUNIT, exit=True)
        try:
            with rounds(options.method, options.workers) as on:
                for _ in range(_ROUNDS):
                    name, number = rng.choice(names), rng.getrandbits(32)
                    on.play(name, number)
                    played += 1
                    if time.monotonic() > until:
                        break
        except Exception:
            failures += 1
            print(
                f"FAILED at or after {name!r} with seed {number}:\n{traceback.format_exc()}",
                flush=True,
            )
        finally:
            faulthandler.cancel_dump_traceback_later()
        fates += on.tally.fates
        deaths += on.tally.deaths
        before.append(me.num_fds())
    print(f"rounds     {played:,}, workers ended {deaths:,}")
    print("fates      " + ", ".join(f"{fate} {n:,}" for fate, n in fates.most_common()))
    print(f"descriptors {before[0]} after the first executor, {before[-1]} after the last")
    print(f"children   {len(me.children(recursive=True))}")
    print(f"failures   {failures}")
    return 1 if failures or before[-1] > before[0] else 0
