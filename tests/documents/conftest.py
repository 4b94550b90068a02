"Small indexes and a tiny model, for all tests of documents."

from helpers.documents import folder, index, llm, poems, town  # noqa: F401 - fixtures
