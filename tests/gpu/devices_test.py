"""Trains on the CPU and on a GPU and compares: losses of a dense and of a hybrid model, in fp32 and bf16, and resumption across devices.

Usage: devices_test.py HYMOE CONFIGS   (on a machine with a GPU; scripts/gpu_check.sh runs it)
"""
import json
import os
import sys
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from program_test import Workspace  # noqa: E402


class Devices(Workspace):
    def losses(self, device, *settings):
        name = "-".join([device, *settings]).replace("=", "_")
        self.ok("train", *settings[:1], "steps=12", f"name={name}", f"device={device}", *settings[1:])
        rows = map(json.loads, open(f"runs/{name}/metrics.jsonl"))
        return [row["lm_loss"] for row in rows if "lm_loss" in row]

    def compare(self, bound, *settings):
        on_cpu, on_gpu = self.losses("cpu", *settings), self.losses("cuda", *settings)
        self.assertEqual(len(on_cpu), 12)
        self.assertLess(max(abs(a - b) for a, b in zip(on_cpu, on_gpu)), bound, (on_cpu, on_gpu))

    def test_a_dense_model(self):
        self.compare(1e-4, "dense.yaml")

    def test_a_hybrid_model(self):
        self.compare(1e-3, "moe.yaml")

    def test_bf16(self):
        self.compare(5e-2, "moe.yaml", "dtype=bfloat16")

    def test_a_run_goes_on_on_the_other_device(self):
        self.ok("train", "moe.yaml", "steps=8", "name=across", "device=cuda")
        self.ok("train", "moe.yaml", "steps=12", "name=across", "device=cpu")
        rows = [json.loads(line) for line in open("runs/across/metrics.jsonl")]
        self.assertEqual([row["step"] for row in rows if "lm_loss" in row], list(range(1, 13)))


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1] + sys.argv[3:], verbosity=2)
