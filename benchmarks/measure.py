"""What several benchmarks measure with."""

import os
import time

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is talkative

from torch.profiler import ProfilerActivity, profile


def fastest(*runs, repeats=7):
    """The least seconds of each, the runs taking turns."""
    best = [float("inf")] * len(runs)
    for _ in range(repeats):
        for n, run in enumerate(runs):
            start = time.perf_counter()
            run()
            best[n] = min(best[n], time.perf_counter() - start)
    return best


def peak(run):
    """Most bytes that were allocated at one time while it ran, and not before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    now = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most
