import pytest

from pairs import disturb, tiny


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("healing") / "teacher", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def student(teacher, tmp_path_factory):
    return disturb(teacher, tmp_path_factory.mktemp("healing") / "student")
