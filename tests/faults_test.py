"""Kills and stops ranks of a run under torchrun at random moments; the run must end with the losses of an unbroken one.

Usage: faults_test.py HYMOE CONFIGS [KILLS]   (with the Python of LibTorch's environment, which has torchrun)
"""
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import unittest

KILLS = int(sys.argv.pop(3)) if len(sys.argv) > 3 else 3
import program_test  # noqa: E402  reads the other arguments
from program_test import HYMOE, TORCHRUN, Workspace  # noqa: E402

SETTINGS = ["moe.yaml", "steps=60", "micro_batch=2", "checkpoint.interval=4", "timeout=4", "eval.tokens=0"]


def rows(name):
    """What a run logged of its steps, but for times."""
    return [{key: row[key] for key in ("step", "loss", "lm_loss", "grad_norm")} for row in map(json.loads, open(f"runs/{name}/metrics.jsonl"))]


def ranks_of(launcher):
    def is_rank(child):
        try:
            return os.path.samefile(f"/proc/{child}/exe", HYMOE)
        except OSError:  # it has ended
            return False

    if launcher.poll() is not None:
        return []
    children = open(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read().split()
    return [int(child) for child in children if is_rank(child)]


class Faults(Workspace):
    def test_a_run_survives_killed_and_stopped_ranks(self):
        if not os.path.exists(TORCHRUN):
            self.skipTest("torchrun is not there: run this with the Python of LibTorch's environment")
        self.finish(self.torchrun(2, "train", *SETTINGS, "name=unbroken"))
        rng = random.Random(1)
        errors = open("errors.txt", "w+")
        launcher, kills = self.start(errors), 0
        while kills < KILLS:
            time.sleep(rng.uniform(0.2, 1.5))
            ranks = ranks_of(launcher)
            while len(ranks) < 2 and launcher.poll() is None:
                time.sleep(0.05)
                ranks = ranks_of(launcher)
            if launcher.poll() is not None:
                # It has ended before a kill: begun anew, with work to lose.
                self.assertEqual(launcher.returncode, 0, open("errors.txt").read())
                self.take_back()
                launcher = self.start(errors)
                continue
            victim, number = rng.choice(ranks), signal.SIGSTOP if kills % 3 == 2 else signal.SIGKILL
            try:
                os.kill(victim, number)
            except ProcessLookupError:  # it has just ended
                continue
            kills += 1
            # The launcher notices, ends the others and starts all anew: none of the old ranks is left.
            struck, deadline = time.time(), time.time() + 120
            while any(rank in ranks_of(launcher) for rank in ranks) and time.time() < deadline:
                time.sleep(0.1)
                if number == signal.SIGSTOP and time.time() > struck + 45 and ranks_of(launcher) == [victim]:
                    os.kill(victim, signal.SIGCONT)  # the others had finished the run: nobody was left to miss it
            self.assertLess(time.time(), deadline, f"rank {victim} with signal {number} was never replaced")
        launcher.wait(timeout=300)
        text = open("errors.txt").read()
        self.assertEqual(launcher.returncode, 0, text)
        self.assertEqual(rows("unbroken"), rows("killed"))
        for line in re.findall(r"^hymoe: .*", text, re.MULTILINE):
            self.assertRegex(line, r"hymoe: rank \d of 2", line)

    def start(self, errors):
        return subprocess.Popen([TORCHRUN, "--no-python", "--standalone", "--nproc-per-node", "2", "--max-restarts", "100", HYMOE,
                                 "train", *SETTINGS, "name=killed"], stdout=subprocess.DEVNULL, stderr=errors)

    def take_back(self):
        """A run that has ended loses all but its oldest checkpoint."""
        kept = sorted(d for d in os.listdir("runs/killed") if re.fullmatch(r"step-\d+", d))
        program_test.write("runs/killed/latest", kept[0] + "\n")
        for name in kept[1:]:
            program_test.shutil.rmtree(os.path.join("runs/killed", name))


if __name__ == "__main__":
    unittest.main(argv=["faults_test.py"], warnings="ignore")
