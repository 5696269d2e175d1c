"""Print what engine.json says of an engine: for which GPUs it is, what it takes, and what fell back."""

import json
import sys
from pathlib import Path


def main(bundle: Path) -> None:
    """Print the facts that decide whether the engine runs somewhere."""
    record = json.loads((bundle / "engines" / "rtx" / "engine.json").read_text(encoding="utf-8"))
    print(f"TensorRT-RTX {record['tensorrt']}, CUDA {record['cuda']}, {record['system']}")
    print(f"GPUs of SM {', '.join(map(str, record['sms']))}, one engine of {record['engine']['bytes'] / 1e6:.1f} MB")
    limits = f"{record['max_prompt']} new tokens, {record['max_context']} in the cache"
    print(f"up to {record['max_batch']} sequences, {limits}")
    for name in ("input_ids", "past_key_values.0.key"):
        given = record["inputs"][name]
        print(f"{name}: {given['dtype']}, {given['min']} to {given['max']}, tuned for {given['opt']}")
    for each in record["fallbacks"]:
        print(f"- {each['what']}: {each['instead']}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
