import pytest
import torch

from tnllm_export.kernels.dispatch import form_for, kernel_choice, use_kernels

CPU = torch.device("cpu")


def test_the_cpu_computes_in_pytorch_by_itself():
    assert form_for(CPU) == "pytorch"


@pytest.mark.gpu
def test_a_cuda_device_runs_triton_by_itself():
    assert form_for(torch.device("cuda")) == "triton"


def test_the_inner_choice_wins_and_ends_with_its_context():
    with use_kernels("pytorch"):
        with use_kernels("auto"):
            assert kernel_choice() == "auto"
        assert kernel_choice() == "pytorch"
    assert kernel_choice() == "auto"


def test_the_choice_that_was_made_last_counts_whichever_ends_first():
    first, second = use_kernels("pytorch"), use_kernels("triton")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert kernel_choice() == "triton"
    second.__exit__(None, None, None)
    assert kernel_choice() == "auto"


def test_the_environment_variable_chooses_unless_a_context_does(monkeypatch):
    monkeypatch.setenv("TNLLM_KERNELS", "pytorch")
    assert kernel_choice() == "pytorch"
    with use_kernels("auto"):
        assert kernel_choice() == "auto"


def test_asking_for_triton_where_it_cannot_run_says_why_and_what_to_do(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use_kernels("triton"), pytest.raises(RuntimeError, match=r"on cpu, not on a CUDA device; use_kernels"):
        form_for(CPU)


def test_triton_runs_on_the_cpu_when_interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with use_kernels("triton"):
        assert form_for(CPU) == "triton"


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="use_kernels: found 'cuda'; expected one of auto, triton, pytorch"):
        use_kernels("cuda").__enter__()


def test_an_unknown_choice_in_the_environment_is_refused_by_the_variables_name(monkeypatch):
    monkeypatch.setenv("TNLLM_KERNELS", "cuda")
    with pytest.raises(ValueError, match="TNLLM_KERNELS: found 'cuda'; expected one of auto, triton, pytorch"):
        kernel_choice()
