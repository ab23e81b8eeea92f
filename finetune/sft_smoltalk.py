"""Fine-tune a merged Mixture-of-Experts model on chats, with TRL: what ``namex tune`` does.

    python finetune/sft_smoltalk.py --output_dir out/tuned                # offline: `tiny` on the packaged chats

To change what happens, copy this file and edit the two steps; the parts of the second are in
`namex_hf/training/run.py`: `load_chats` for the data, `Choice` for what trains, `tune` for the trainer.
"""

import sys

from namex_hf.commands.tune import main

if __name__ == "__main__":
    sys.exit(main(prog="sft_smoltalk.py"))
