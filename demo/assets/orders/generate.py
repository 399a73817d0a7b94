"""Writes train.jsonl and test.jsonl: orders in plain words, and the same orders as JSON records.

    python demo/assets/orders/generate.py

A row is a chat: an instruction, a message that orders something, and the record as the answer. Items, cities and
sentences of the test rows occur in no training row; counts and days do. The seed is fixed, so the files come out the
same on each machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

INSTRUCTION = "Write the order as JSON with the keys item, count, city and day."

COUNTS = {
    "a": 1, "one": 1, "two": 2, "a pair of": 2, "three": 3, "four": 4, "five": 5, "six": 6, "half a dozen": 6,
    "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11, "twelve": 12, "a dozen": 12, "fifteen": 15,
    "twenty": 20, "thirty": 30, "14": 14, "25": 25, "40": 40, "60": 60, "75": 75, "100": 100,
}  # fmt: skip
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


class Words(NamedTuple):
    """What the messages of one split are made of."""

    items: str
    cities: str
    sentences: str


TRAIN = Words(
    items="""lamp chair table mirror carpet pillow blanket bottle basket bucket clock candle kettle teapot plate spoon
        ladder hammer shovel helmet jacket sweater backpack suitcase umbrella notebook pencil stapler printer keyboard
        speaker camera guitar drum bicycle scooter tent lantern rope magnet battery cushion curtain towel vase wardrobe
        bench stool cradle mattress mug goblet thermos skillet whisk grater colander apron napkin tray jar barrel crate
        pallet wheelbarrow rake sickle chisel drill wrench clamp nail bolt hinge padlock doorbell faucet radiator fan
        freezer blender heater laptop router headset projector tripod telescope microscope thermometer scale ruler
        eraser crayon easel canvas brush envelope stamp folder binder puzzle doll marble kite balloon skateboard racket
        snorkel paddle saddle harness leash birdcage aquarium tulip cactus fern seedling brick tile plank gutter
        glove mitten sandal slipper boot belt necktie cufflink bracelet necklace brooch ring perfume soap sponge comb
        razor bandage crutch wheelchair stroller poster globe atlas dictionary cookbook bookmark flute harp cello
        accordion tambourine ukulele""",
    cities="""Oslo Madrid Dublin Prague Athens Vienna Lisbon Warsaw Berlin Geneva Naples Munich Toronto Chicago Boston
        Denver Seattle Houston Lima Bogota Nairobi Cairo Accra Lagos Delhi Mumbai Seoul Osaka Hanoi Manila Sydney
        Perth Auckland Tunis Rabat Zurich Bristol Leeds Porto Turin Stockholm Gothenburg Malmo Copenhagen Aarhus Tampere
        Turku Tallinn Riga Vilnius Gdansk Poznan Wroclaw Brno Bratislava Zagreb Split Belgrade Sofia Bucharest Varna
        Salonica Izmir Ankara Adana Beirut Amman Haifa Baghdad Basra Tehran Shiraz Kabul Lahore Multan Jaipur Chennai
        Kolkata Dhaka Colombo Yangon Saigon Penang Cebu Davao Taipei Nagoya Sapporo Busan Harbin Tianjin Wuhan Darwin
        Hobart Suva Noumea Halifax Calgary Winnipeg Ottawa Phoenix Tucson Omaha Memphis Atlanta Tampa Havana Kingston
        Caracas Medellin Cali Cusco Rosario Cordoba Salvador Recife Curitiba Luanda Lusaka Harare Durban Maputo""",
    sentences="""Could you send {count} {items} to {city} by {day}?
        Please ship {count} {items} to {city} on {day}.
        We need {count} {items} in {city} by {day}.
        I would like to order {count} {items}. Deliver to {city} on {day}.
        Hello, can {count} {items} be in {city} on {day}?
        By {day} our shop in {city} must have {count} {items}.
        {count} {items} for {city}, please, not later than {day}.
        Our {city} office is waiting for {count} {items}; {day} would be fine.
        On {day}, bring {count} {items} to the store in {city}.
        Hi! It's {city} again. Same as last time: {count} {items}, {day}.
        Can I get {count} {items} delivered on {day}? The address is in {city}.
        For {day}: {count} {items}, to be sent to {city}. Thanks!
        My sister in {city} wants {count} {items} for her party on {day}.
        Reserve {count} {items} for me, I will pick them up in {city} on {day}.
        In {city} there are no {items} left. Send {count} before {day}.
        Dear team, the customer in {city} ordered {count} {items} and expects them on {day}.
        {city} calling: {day} at noon, {count} {items}, as agreed.
        You forgot {count} {items}! They were due in {city} on {day}.
        The school in {city} opens on {day} and still lacks {count} {items}.
        Until {day} I stay in {city}. Have {count} {items} brought to my hotel.""",
)

TEST = Words(
    items="""sofa desk bookshelf doormat saucepan toaster screwdriver raincoat scarf wallet calendar microphone violin
        trumpet kayak flashlight compass hammock pancake trophy""",
    cities="""Paris Rome Helsinki Budapest Hamburg Glasgow Montreal Dallas Santiago Quito Kampala Dakar Karachi Bangkok
        Jakarta Kyoto Melbourne Bergen Krakow Valencia""",
    sentences="""Will {count} {items} reach {city} before {day}?
        Our branch in {city} has run out of {items}: we want {count} by {day}.
        Good morning, I'm calling from {city}. I'd like {count} {items}, and {day} is the latest that works.
        Put me down for {count} {items}. I live in {city} and am at home on {day}.
        {day} delivery, {city}, {count} {items}.
        The hotel in {city} asks for {count} {items}, arriving {day}.
        Get {count} {items} over to {city}! They open on {day}.
        If it is possible, let {count} {items} arrive in {city} on {day}.""",
)


def rows(words: Words, count: int, random: Random) -> Iterator[dict[str, Any]]:
    """`count` different chats."""
    sentences = [line.strip() for line in words.sentences.splitlines()]
    seen: set[str] = set()
    while len(seen) < count:
        item, city, day = random.choice(words.items.split()), random.choice(words.cities.split()), random.choice(DAYS)
        said, number = random.choice(list(COUNTS.items()))
        items = item if number == 1 else plural(item)
        said = "an" if said == "a" and item[0] in "aeiou" else said
        message = random.choice(sentences).format(count=said, items=items, city=city, day=day)
        message = message[0].upper() + message[1:]
        if message in seen:
            continue
        seen.add(message)
        record = {"item": items, "count": number, "city": city, "day": day}
        yield chat(message, json.dumps(record))


def chat(message: str, answer: str) -> dict[str, Any]:
    turns = {"system": INSTRUCTION, "user": message, "assistant": answer}
    return {"messages": [{"role": role, "content": content} for role, content in turns.items()]}


def plural(item: str) -> str:
    """Of the words above, none of which needs more than this."""
    if item.endswith(("s", "x", "ch", "sh")):
        return f"{item}es"
    if item.endswith("y") and item[-2] not in "aeiou":
        return f"{item[:-1]}ies"
    if item.endswith("f"):
        return f"{item[:-1]}ves"
    return f"{item}s"


def main(folder: Path = Path(__file__).parent) -> None:
    random = Random(0)
    for name, words, count in (("train", TRAIN, 400), ("test", TEST, 100)):
        lines = [json.dumps(row) for row in rows(words, count, random)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
