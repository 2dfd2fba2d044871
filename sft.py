"""Cold start on tool-using trajectories: `accelerate launch sft.py --config configs/quickstart_sft.yaml`."""

from arpo_trl.scripts.sft import main

if __name__ == "__main__":
    main()
