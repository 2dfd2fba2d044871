"""Train a tool-using policy: `accelerate launch train.py --config configs/quickstart.yaml`."""

from arpo_trl.scripts.train import main

if __name__ == "__main__":
    main()
