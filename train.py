"""Train a tool-using policy: `accelerate launch train.py --config configs/quickstart.yaml`."""

from arpo_trl.common.waiting import say_loading

if __name__ == "__main__":
    say_loading("train.py")
    from arpo_trl.scripts.train import main

    main()
