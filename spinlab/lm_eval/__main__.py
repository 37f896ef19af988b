"""lm-eval's command line, to which artefacts are a model: python -m spinlab.lm_eval

python -m spinlab.lm_eval --model spinlab --model_args pretrained=FOLDER --tasks arc_easy
"""

from spinlab.launch import repeat_sums
from spinlab.lm_eval import register
from spinlab.streams import ending, keep_streams


def main() -> None:
    """Run lm-eval's command line; exit status 2 and one sentence for what a user can mend."""
    repeat_sums()
    register()
    from lm_eval.__main__ import cli_evaluate

    with ending("spinlab.lm_eval"):
        cli_evaluate()


if __name__ == "__main__":
    keep_streams()
    main()
