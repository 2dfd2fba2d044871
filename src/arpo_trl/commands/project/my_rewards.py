"""The rewards of this project. `config.yaml` names them as my_rewards:NAME."""

from arpo_trl.rewards import extract_answer


def exact(turns: list[list[str]], answer: list[list[str]], **_: object) -> list[float]:
    """1 for the right answer in the last turn, 0.1 for another answer in the right format, 0 without an answer.

    `turns` contains, for each completion, the model's text turn by turn. `answer` is the data's column with the
    accepted answers. docs/rewards.md lists the other arguments that a reward can have.
    """
    rewards = []
    for written, accepted in zip(turns, answer, strict=True):
        found = extract_answer(written[-1]) if written else None  # of <answer>… \boxed{found} …</answer>
        rewards.append(0.0 if found is None else 1.0 if found in accepted else 0.1)
    return rewards
