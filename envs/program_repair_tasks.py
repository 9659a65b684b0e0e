"""The bundled set of `ProgramRepair`: small functions with one mistake each, and tests that nobody is shown.

A task's text: a line that says what the function shall do, an example, the faulty function; behind `---` its
hidden tests, one `arguments -> result` a line. Arguments and results are Python literals.
"""

import ast
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True)
class Task:
    """One function to repair.

    Attributes:
        name: the function's.
        purpose: what it shall do, one line.
        example: a call and its result, which the prompt shows.
        faulty: its source, with the mistake.
        tests: (arguments, result) of each hidden test.
    """

    name: str
    purpose: str
    example: str
    faulty: str
    tests: tuple[tuple[tuple[Any, ...], Any], ...]

    @property
    def signature(self) -> str:
        """The line with `def`, its line end included."""
        return self.faulty.splitlines(keepends=True)[0]


@cache
def load_tasks() -> tuple[Task, ...]:
    """All tasks, in the order of the file."""
    return tuple(map(_task, _TASKS.strip().split("\n\n\n")))


def _task(text: str) -> Task:
    head, _, tests = text.strip().partition("\n---\n")
    purpose, example, faulty = head.split("\n", 2)
    name = faulty.split("(")[0].removeprefix("def ")
    pairs = []
    for line in tests.splitlines():
        arguments, _, result = line.rpartition(" -> ")
        pairs.append((ast.literal_eval(f"({arguments},)"), ast.literal_eval(result)))
    return Task(name, purpose, example, faulty.rstrip() + "\n", tuple(pairs))


_TASKS = """
Return x, or the nearer of low and high where x is outside of them.
clamp(7, 0, 5) == 5
def clamp(x, low, high):
    return max(low, max(x, high))
---
7, 0, 5 -> 5
-3, 0, 5 -> 0
2, 0, 5 -> 2
0, 0, 5 -> 0
5, 0, 5 -> 5
1.5, 1, 2 -> 1.5


Return the n-th Fibonacci number; the first two are 0 and 1, n counts from 0.
fibonacci(6) == 8
def fibonacci(n):
    a, b = 0, 1
    for _ in range(n - 1):
        a, b = b, a + b
    return a
---
0 -> 0
1 -> 1
2 -> 1
6 -> 8
10 -> 55
40 -> 102334155


Return True where the text reads the same backwards, letters and digits only, upper and lower case alike.
is_palindrome("Anna") == True
def is_palindrome(text):
    kept = [c for c in text if c.isalnum()]
    return kept == kept[::-1]
---
"Anna" -> True
"abc" -> False
"A man, a plan, a canal: Panama" -> True
"" -> True
"No lemon, no melon" -> True
"ab" -> False


Return the index of the value in an ascending list, or -1 where it is not in it.
binary_search([1, 3, 5], 5) == 2
def binary_search(values, wanted):
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        if values[middle] == wanted:
            return middle
        if values[middle] < wanted:
            low = middle + 1
        else:
            high = middle - 1
    return -1
---
[1, 3, 5], 5 -> 2
[1, 3, 5], 1 -> 0
[1, 3, 5], 4 -> -1
[], 1 -> -1
[7], 7 -> 0
[1, 2, 3, 4, 5, 6, 7, 8], 6 -> 5


Return how often each word occurs in a text, words apart by blanks, in lower case.
count_words("a b A") == {"a": 2, "b": 1}
def count_words(text):
    counts = {}
    for word in text.split():
        counts[word] = counts.get(word, 0) + 1
    return counts
---
"a b A" -> {"a": 2, "b": 1}
"" -> {}
"one  two   two" -> {"one": 1, "two": 2}
"The the THE" -> {"the": 3}


Return the list without repeated values; of each the first one stays where it is.
unique([3, 1, 3, 2, 1]) == [3, 1, 2]
def unique(values):
    return sorted(set(values))
---
[3, 1, 3, 2, 1] -> [3, 1, 2]
[] -> []
["b", "a", "b"] -> ["b", "a"]
[1, 1, 1] -> [1]
[2, 1] -> [2, 1]


Return the mean of the numbers, or None for an empty list.
mean([1, 2, 3]) == 2.0
def mean(numbers):
    return sum(numbers) // len(numbers)
---
[1, 2, 3] -> 2.0
[1, 2] -> 1.5
[] -> None
[0.5] -> 0.5
[-1, 1, 3, 4] -> 1.75


Return the median; of an even number of values the mean of the two in the middle.
median([3, 1, 2]) == 2
def median(numbers):
    ordered = sorted(numbers)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle] + ordered[middle + 1]) / 2
---
[3, 1, 2] -> 2
[4, 1, 2, 3] -> 2.5
[5] -> 5
[1, 2] -> 1.5
[9, 7, 8, 1, 3, 5] -> 6.0


Return the greatest common divisor of two whole numbers, never negative.
gcd(12, 18) == 6
def gcd(a, b):
    while b:
        a, b = b, a // b
    return a
---
12, 18 -> 6
7, 5 -> 1
0, 9 -> 9
-4, 6 -> 2
100, 75 -> 25


Return True for a prime number.
is_prime(7) == True
def is_prime(n):
    for divisor in range(2, int(n ** 0.5)):
        if n % divisor == 0:
            return False
    return True
---
7 -> True
1 -> False
2 -> True
9 -> False
25 -> False
97 -> True
0 -> False


Return the list of lists as one flat list, however deep it goes.
flatten([1, [2, [3]]]) == [1, 2, 3]
def flatten(values):
    flat = []
    for value in values:
        if isinstance(value, list):
            flat.extend(value)
        else:
            flat.append(value)
    return flat
---
[1, [2, [3]]] -> [1, 2, 3]
[] -> []
[[[[4]]]] -> [4]
[[], [1, []]] -> [1]
["ab", ["c"]] -> ["ab", "c"]


Return the columns of a table, a list of rows of the same length, as a list of lists.
transpose([[1, 2], [3, 4]]) == [[1, 3], [2, 4]]
def transpose(rows):
    return [[row[i] for row in rows] for i in range(len(rows))]
---
[[1, 2], [3, 4]] -> [[1, 3], [2, 4]]
[[1, 2, 3]] -> [[1], [2], [3]]
[] -> []
[[1], [2], [3]] -> [[1, 2, 3]]


Return True where every bracket ( [ { is closed by its own kind in the right order.
balanced("([])") == True
def balanced(text):
    opened = []
    pairs = {")": "(", "]": "[", "}": "{"}
    for c in text:
        if c in "([{":
            opened.append(c)
        elif c in pairs:
            if opened.pop() != pairs[c]:
                return False
    return True
---
"([])" -> True
"(]" -> False
"((" -> False
")" -> False
"" -> True
"a(b)c{d}" -> True


Return the whole number that a Roman numeral stands for.
from_roman("XIV") == 14
def from_roman(text):
    values = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}
    total = 0
    for i, c in enumerate(text):
        if i + 1 < len(text) and values[c] <= values[text[i + 1]]:
            total -= values[c]
        else:
            total += values[c]
    return total
---
"XIV" -> 14
"III" -> 3
"MCMXCIV" -> 1994
"LVIII" -> 58
"IX" -> 9
"XX" -> 20


Return the parts of the list, each of n values but for the last.
chunks([1, 2, 3], 2) == [[1, 2], [3]]
def chunks(values, n):
    return [values[i:i + n] for i in range(0, len(values) - n + 1, n)]
---
[1, 2, 3], 2 -> [[1, 2], [3]]
[1, 2, 3, 4], 2 -> [[1, 2], [3, 4]]
[], 3 -> []
[1], 5 -> [[1]]
[1, 2, 3, 4, 5], 4 -> [[1, 2, 3, 4], [5]]


Return the text with each letter moved n places on in the alphabet, from z back to a; all else stays.
caesar("xyz", 3) == "abc"
def caesar(text, n):
    moved = ""
    for c in text:
        if c.islower():
            moved += chr(ord(c) + n)
        elif c.isupper():
            moved += chr((ord(c) - 65 + n) % 26 + 65)
        else:
            moved += c
    return moved
---
"xyz", 3 -> "abc"
"Abc", 1 -> "Bcd"
"Hello, World!", 13 -> "Uryyb, Jbeyq!"
"a", -1 -> "z"
"abc", 26 -> "abc"


Return the lengths of the runs of equal letters, as pairs of letter and length.
run_lengths("aab") == [("a", 2), ("b", 1)]
def run_lengths(text):
    runs = []
    count = 1
    for i in range(1, len(text)):
        if text[i] == text[i - 1]:
            count += 1
        else:
            runs.append((text[i - 1], count))
            count = 1
    return runs
---
"aab" -> [("a", 2), ("b", 1)]
"" -> []
"abc" -> [("a", 1), ("b", 1), ("c", 1)]
"zzzz" -> [("z", 4)]


Return the two ascending lists as one ascending list.
merge([1, 3], [2]) == [1, 2, 3]
def merge(a, b):
    merged = []
    i = j = 0
    while i < len(a) and j < len(b):
        if a[i] <= b[j]:
            merged.append(a[i])
            i += 1
        else:
            merged.append(b[j])
            j += 1
    return merged
---
[1, 3], [2] -> [1, 2, 3]
[], [] -> []
[1], [] -> [1]
[], [2, 4] -> [2, 4]
[1, 1], [1, 5, 9] -> [1, 1, 1, 5, 9]


Return the largest sum of neighbouring values, at least one of them.
best_sum([1, -2, 3, 4]) == 7
def best_sum(values):
    best = current = 0
    for value in values:
        current = max(value, current + value)
        best = max(best, current)
    return best
---
[1, -2, 3, 4] -> 7
[-3, -1, -2] -> -1
[5] -> 5
[2, -1, 2] -> 3
[-2, 1, -3, 4, -1, 2, 1, -5, 4] -> 6


Return the number of days in a month (1 to 12) of a year.
days_in_month(2024, 2) == 29
def days_in_month(year, month):
    days = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
    if month == 2 and year % 4 == 0:
        return 29
    return days[month]
---
2024, 2 -> 29
2023, 2 -> 28
1900, 2 -> 28
2000, 2 -> 29
2023, 1 -> 31
2023, 12 -> 31
2023, 4 -> 30


Return the sum of the digits of a whole number, without its sign.
digit_sum(-45) == 9
def digit_sum(n):
    total = 0
    while n > 0:
        total += n % 10
        n = n // 10
    return total
---
-45 -> 9
0 -> 0
999 -> 27
10 -> 1
123456789 -> 45


Return the words of a text, the longest first; of the same length in the order of the alphabet.
by_length("b aa a") == ["aa", "a", "b"]
def by_length(text):
    return sorted(text.split(), key=len, reverse=True)
---
"b aa a" -> ["aa", "a", "b"]
"" -> []
"one three two" -> ["three", "one", "two"]
"d c b a" -> ["a", "b", "c", "d"]
"xx y zz" -> ["xx", "zz", "y"]


Return a new dictionary with both dictionaries' keys; where both have one, the sum of the two values.
add_counts({"a": 1}, {"a": 2, "b": 3}) == {"a": 3, "b": 3}
def add_counts(first, second):
    total = first
    for key in second:
        total[key] = total[key] + second[key]
    return total
---
{"a": 1}, {"a": 2, "b": 3} -> {"a": 3, "b": 3}
{}, {} -> {}
{"x": 1}, {} -> {"x": 1}
{}, {"y": 2} -> {"y": 2}
{"a": -1, "b": 1}, {"a": 1, "b": 1} -> {"a": 0, "b": 2}


Return the position of the largest value, the first of equals, or None for an empty list.
argmax([1, 5, 5]) == 1
def argmax(values):
    best = 0
    for i, value in enumerate(values):
        if value >= values[best]:
            best = i
    return best
---
[1, 5, 5] -> 1
[] -> None
[3] -> 0
[-2, -1, -3] -> 1
[4, 4, 4] -> 0


Return the values moved n places to the right, those that fall off the end coming in at the start.
rotate([1, 2, 3], 1) == [3, 1, 2]
def rotate(values, n):
    return values[-n:] + values[:-n]
---
[1, 2, 3], 1 -> [3, 1, 2]
[1, 2, 3], 0 -> [1, 2, 3]
[1, 2, 3], 4 -> [3, 1, 2]
[], 2 -> []
[1, 2, 3, 4], -1 -> [2, 3, 4, 1]


Return a whole number, 0 or more, in binary digits, without a prefix.
to_binary(5) == "101"
def to_binary(n):
    digits = ""
    while n:
        digits += str(n % 2)
        n //= 2
    return digits
---
5 -> "101"
0 -> "0"
6 -> "110"
1 -> "1"
255 -> "11111111"
8 -> "1000"


Return the number of single-letter edits (put in, take out, replace) that turn one word into the other.
edits("kitten", "sitting") == 3
def edits(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + 1)
    return row[-1]
---
"kitten", "sitting" -> 3
"", "abc" -> 3
"abc", "" -> 3
"same", "same" -> 0
"ab", "ba" -> 2
"flaw", "lawn" -> 2


Return the moving mean over windows of n values; a list that is too short has none.
moving_mean([1, 2, 3, 4], 2) == [1.5, 2.5, 3.5]
def moving_mean(values, n):
    means = []
    for i in range(len(values) - n):
        means.append(sum(values[i:i + n]) / n)
    return means
---
[1, 2, 3, 4], 2 -> [1.5, 2.5, 3.5]
[1, 2], 3 -> []
[4], 1 -> [4.0]
[1, 2, 3], 3 -> [2.0]
[0, 10, 20, 30], 3 -> [10.0, 20.0]
"""
