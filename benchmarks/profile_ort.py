"""Where the time of a bundle goes in ONNX Runtime: the smallest time of each node over some runs, by operator.

    python benchmarks/profile_ort.py out/w4a8k8v8 --tokens 512 --past 0      # prefill
    python benchmarks/profile_ort.py out/w4a8k8v8 --tokens 1 --past 511      # decoding

The profiler itself adds some microseconds to every node, so many small nodes look worse than they are.
"""

import argparse
import collections
import json
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort

from planish.compiler.bundle.bundle import Bundle

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--past", type=int, default=0)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = arguments.threads, 3
        options.enable_profiling, options.profile_file_prefix = True, f"{scratch}/profile"
        session = ort.InferenceSession(str(Bundle.open(arguments.bundle).model_path()), options)
        total = arguments.past + arguments.tokens
        feeds = {
            "input_ids": np.full((1, arguments.tokens), 5),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(arguments.past, total)[None],
            "num_logits_to_keep": np.array(1),
        }
        sizes = {"batch": 1, "past": arguments.past}
        for each in session.get_inputs():
            if each.name.startswith("past_key_values."):
                feeds[each.name] = np.ones([sizes.get(dim, dim) for dim in each.shape], DTYPES[each.type])
        for _ in range(arguments.runs):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    smallest: dict[tuple[str, str], int] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            key = event["args"]["op_name"], event["name"]
            smallest[key] = min(smallest.get(key, event["dur"]), event["dur"])
    time, count = collections.Counter[str](), collections.Counter[str]()
    for (op, _), microseconds in smallest.items():
        if op != "If":  # its nodes are counted themselves
            time[op] += microseconds
            count[op] += 1
    print(f"{sum(time.values()) / 1e3:8.2f} ms  {sum(count.values()):5d} nodes")
    for op, microseconds in time.most_common():
        print(f"{microseconds / 1e3:8.2f} ms  {count[op]:5d} {op}")


if __name__ == "__main__":
    main()
