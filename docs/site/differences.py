"""What docs/differences.md says of each loss."""

import re

from fusedloss import functional


def words(text: str) -> str:
    return re.sub(r"[\s_-]+", " ", text).lower()


def spoken(name: str) -> str:
    """A name as it is spoken: HuberLoss and huber_loss are huber, Multi-margin is multi margin."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return words(apart).removesuffix(" loss")


class Names:
    """Finds which losses a text names. The longest name counts: sigmoid focal is not the focal loss."""

    def __init__(self, modules: dict[str, str]) -> None:
        functions = {**{name: name for name in functional.__all__}, **modules}
        self.functions = {spoken(name): function for name, function in functions.items()}
        self.functions |= {words(name): function for name, function in functions.items()}
        longest_first = sorted(self.functions, key=len, reverse=True)
        self.pattern = re.compile(r"\b(" + "|".join(map(re.escape, longest_first)) + r")\b")

    def within(self, text: str) -> set[str]:
        return {self.functions[found] for found in self.pattern.findall(words(text))}


def differences(document: str, modules: dict[str, str]) -> dict[str, list[str]]:
    """By function, the items that name it before they come to torch, and all of a section that is named for it."""
    names = Names(modules)
    found: dict[str, list[str]] = {name: [] for name in functional.__all__}
    for section in document.split("\n## ")[1:]:
        heading, _, body = section.partition("\n")
        for item in re.split(r"\n(?=- )|\n\n+", body.strip()):
            own = names.within(item.partition("torch:")[0]) if item.startswith("- ") else set()
            for name in own or names.within(heading):
                found[name].append(item)
    return found
