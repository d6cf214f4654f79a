"""Which version of an operation runs."""

import subprocess
import sys

import pytest
import torch
from conftest import DEVICE, ROOT
from forks import ended

from nanoredi.kernels import dispatch


@pytest.fixture
def double():
    @dispatch.operation
    def double(x, times=2):
        """What it computes."""
        return x * times

    return double


def test_the_device_s_version_runs_unless_it_declines(double):
    ones = torch.ones(2, device=DEVICE)
    assert double(ones).tolist() == [2, 2] and double.__doc__ == "What it computes."

    @double.on(DEVICE.type)
    def faster(x, times=2):
        return "faster" if times == 2 else NotImplemented

    assert double(ones) == double(x=ones) == faster(ones) == "faster"
    assert double(ones, 3).tolist() == double(ones, times=3).tolist() == [3, 3]
    assert double.plain(ones).tolist() == [2, 2]
    assert double(torch.ones(2, device="meta")).is_meta  # a device with neither versions nor a package


def test_hooks_without_a_device_s_version_do_nothing(plain):
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    assert dispatch.prepare_for_training(p) is None and p.grad is not None
    assert dispatch.prepare_for_sampling(p, True) is p
    assert dispatch.after_step(torch.tensor(1), 1, 10**9, torch.float32) is None
    dispatch.drop_gradient(p)
    assert p.grad is None


def test_a_device_s_package_is_imported_with_its_first_tensor(forks, tmp_path):
    """Checked in a process that has imported all of nanoredi."""
    script = """
import sys
before = {name for name in sys.modules if name.startswith("nanoredi.")}
import torch
from nanoredi.kernels import rms_norm
rms_norm(torch.ones(2, 16), torch.ones(16), 1e-6)
after = {name for name in sys.modules if name.startswith("nanoredi.")}
print({name for name in after - before if not name.startswith("nanoredi.cpu")}, "nanoredi.cpu" in before)
"""
    (tmp_path / "first_tensor.py").write_text(script)
    assert ended(forks.start(tmp_path, tmp_path / "first_tensor.py")).stdout == "set() False\n"


def test_the_first_line_of_nanoredi_imports_no_torch():
    code = "import sys, nanoredi; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
