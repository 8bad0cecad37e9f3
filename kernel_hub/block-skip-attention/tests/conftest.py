"""The mark that kernel-builder's CI selects."""


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "kernels_ci: run by the CI of the Hub's kernels")
