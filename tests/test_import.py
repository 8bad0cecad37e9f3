"""Importing the package registers two names and does nothing else."""

from __future__ import annotations

import subprocess
import sys
import textwrap


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_patches_nothing_loads_nothing_and_stays_offline() -> None:
    run(
        """
        import socket, sys

        def refuse(*args, **kwargs):
            raise AssertionError("the import went to the network")

        import torch, transformers, transformers.masking_utils, transformers.modeling_utils
        from transformers import AttentionInterface, AttentionMaskInterface

        socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse

        def everything():
            found = {}
            for name, module in list(sys.modules.items()):
                if name == "torch" or name.startswith(("transformers", "torch.nn")):
                    for key, value in list(vars(module).items()):
                        if callable(value):
                            found[name, key] = id(value)
                            if isinstance(value, type):
                                for attribute, member in list(vars(value).items()):
                                    found[name, key, attribute] = id(member)
            return found

        before = everything()
        attention = dict(AttentionInterface._global_mapping)
        masks = dict(AttentionMaskInterface._global_mapping)
        operators = set(torch._C._dispatch_get_all_op_names())

        import hf_sparse_attention

        after = everything()
        changed = [key for key in before if after.get(key) != before[key]]
        assert not changed, changed
        ours = {"blasst", "bsfa"}
        assert set(AttentionInterface._global_mapping) - set(attention) == ours
        assert set(AttentionMaskInterface._global_mapping) - set(masks) == ours
        assert all(AttentionInterface._global_mapping[k] is v for k, v in attention.items())
        assert all(AttentionMaskInterface._global_mapping[k] is v for k, v in masks.items())
        new = set(torch._C._dispatch_get_all_op_names()) - operators
        assert not new, new
        assert "kernels" not in sys.modules
        with open("/proc/self/maps") as maps:
            assert "block_skip" not in maps.read()
        """
        if sys.platform == "linux"
        else "import hf_sparse_attention"
    )


def test_import_costs_little_beyond_transformers() -> None:
    """What a script that uses transformers anyway pays on top."""
    seconds = run(
        """
        import time
        import torch, transformers
        from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
        start = time.perf_counter()
        import hf_sparse_attention
        print(time.perf_counter() - start)
        """
    )
    assert float(seconds) < 1.0


def test_every_public_name_exists() -> None:
    run(
        """
        import hf_sparse_attention
        for name in hf_sparse_attention.__all__:
            assert getattr(hf_sparse_attention, name) is not None, name
            assert name in dir(hf_sparse_attention)
        try:
            hf_sparse_attention.nothing_of_the_kind
        except AttributeError as error:
            assert "nothing_of_the_kind" in str(error)
        else:
            raise AssertionError
        """
    )
