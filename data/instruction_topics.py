"""What the instruction-following questions ask for, and the answers that count as being on topic."""

_LISTS = {
    "a fruit": (
        "apple banana orange grape pear peach plum mango lemon lime cherry strawberry blueberry raspberry kiwi "
        "melon watermelon pineapple fig apricot papaya grapefruit coconut avocado tomato pomegranate blackberry "
        "cantaloupe"
    ),
    "a vegetable": (
        "carrot potato onion broccoli spinach lettuce cabbage pea corn tomato cucumber celery cauliflower pepper "
        "kale zucchini radish turnip beet bean garlic asparagus eggplant squash pumpkin leek"
    ),
    "an animal": (
        "dog cat lion tiger elephant horse cow pig sheep goat bear wolf fox rabbit mouse rat deer monkey giraffe "
        "zebra kangaroo panda whale dolphin shark snake frog bird chicken duck camel hippo rhino koala penguin "
        "eagle"
    ),
    "a farm animal": (
        "cow pig sheep goat horse chicken duck hen rooster turkey donkey goose lamb bull cattle pony llama"
    ),
    "a wild animal": (
        "lion tiger elephant bear wolf fox deer monkey giraffe zebra kangaroo panda leopard cheetah hippo rhino "
        "hyena gorilla moose buffalo jaguar snake crocodile coyote"
    ),
    "a sea animal": (
        "whale dolphin shark fish octopus squid crab lobster seal turtle jellyfish starfish shrimp tuna salmon "
        "clam oyster seahorse walrus"
    ),
    "a bird": (
        "eagle sparrow robin crow owl hawk pigeon parrot duck swan penguin chicken turkey seagull dove falcon "
        "raven peacock hummingbird goose woodpecker finch cardinal flamingo ostrich stork canary"
    ),
    "a fish": (
        "salmon tuna trout cod shark bass carp goldfish herring sardine mackerel catfish halibut tilapia eel perch "
        "clownfish swordfish flounder pike"
    ),
    "an insect": (
        "ant bee butterfly fly mosquito beetle wasp moth grasshopper cricket ladybug dragonfly cockroach termite "
        "firefly honeybee mantis"
    ),
    "a pet": "dog cat fish hamster rabbit parrot bird turtle goldfish mouse snake lizard",
    "a color": (
        "red blue green yellow orange purple pink black white brown gray grey gold silver violet indigo turquoise "
        "teal maroon beige navy cyan magenta crimson lavender"
    ),
    "a country": (
        "france germany italy spain china japan india brazil canada mexico russia england australia egypt greece "
        "turkey sweden norway poland portugal argentina chile peru kenya nigeria usa america ireland switzerland "
        "netherlands belgium austria denmark finland thailand vietnam korea indonesia"
    ),
    "a city": (
        "paris london tokyo berlin rome madrid beijing delhi moscow chicago boston sydney cairo toronto seattle "
        "york angeles francisco dubai singapore bangkok vienna amsterdam barcelona lisbon athens istanbul mumbai "
        "shanghai miami houston dallas"
    ),
    "a continent": "africa asia europe america australia antarctica oceania",
    "an ocean": "pacific atlantic indian arctic southern",
    "a river": (
        "nile amazon mississippi danube rhine thames yangtze ganges volga missouri colorado seine hudson congo"
    ),
    "a mountain": "everest kilimanjaro fuji denali k2 blanc rainier matterhorn mckinley olympus elbrus aconcagua",
    "a sport": (
        "soccer football basketball baseball tennis golf hockey swimming volleyball cricket rugby boxing running "
        "cycling skiing surfing gymnastics wrestling badminton"
    ),
    "a musical instrument": (
        "piano guitar violin drum flute trumpet cello saxophone clarinet harp trombone organ banjo ukulele "
        "accordion harmonica oboe viola tuba keyboard"
    ),
    "a flower": (
        "rose tulip daisy lily sunflower orchid daffodil violet lavender carnation marigold iris peony jasmine "
        "poppy dandelion chrysanthemum hibiscus"
    ),
    "a tree": (
        "oak maple pine birch willow elm cedar palm fir spruce ash redwood cherry apple beech cypress poplar "
        "sycamore sequoia banyan"
    ),
    "a drink": "water coffee tea milk juice soda lemonade cola beer wine coke smoothie cocoa cocktail",
    "a dessert": (
        "cake pie cookie brownie pudding cheesecake chocolate cupcake doughnut donut tiramisu sorbet cream tart "
        "custard gelato"
    ),
    "a breakfast food": (
        "egg pancake cereal toast bacon oatmeal waffle bagel yogurt muffin sausage granola omelette omelet "
        "croissant fruit"
    ),
    "a tool": "hammer saw screwdriver wrench drill pliers axe shovel rake knife scissors ladder chisel level",
    "a piece of clothing": (
        "shirt pants dress skirt jacket coat hat sock shoe sweater jeans scarf glove tie shorts blouse suit "
        "t-shirt hoodie belt"
    ),
    "a piece of furniture": (
        "chair table sofa bed desk couch bookshelf dresser lamp cabinet stool bench shelf wardrobe"
    ),
    "a planet": "mercury venus earth mars jupiter saturn uranus neptune pluto",
    "a metal": ("iron gold silver copper aluminum aluminium steel zinc tin lead nickel platinum titanium bronze brass"),
    "a language": (
        "english french spanish german italian chinese japanese russian arabic hindi portuguese korean latin greek "
        "mandarin dutch swedish turkish python"
    ),
    "a month": "january february march april may june july august september october november december",
    "a day of the week": "monday tuesday wednesday thursday friday saturday sunday",
    "a season": "spring summer autumn fall winter",
    "a shape": ("circle square triangle rectangle oval star heart diamond pentagon hexagon cube sphere octagon cone"),
    "a part of the body": (
        "head arm leg hand foot eye ear nose mouth heart brain knee finger toe neck shoulder stomach back chest "
        "lung skin"
    ),
    "a vehicle": (
        "car truck bus bicycle motorcycle train airplane plane boat van bike ship helicopter scooter taxi tractor suv"
    ),
    "a job": (
        "doctor teacher nurse engineer lawyer farmer chef pilot police firefighter artist writer scientist dentist "
        "plumber carpenter accountant programmer developer manager"
    ),
    "a school subject": (
        "math mathematics science history english art music geography biology chemistry physics reading writing "
        "literature algebra"
    ),
    "a toy": "doll ball puzzle robot car train lego block yo-yo teddy kite truck barbie slinky",
    "an emotion": (
        "happiness joy sadness anger fear love surprise disgust happy sad angry hope excitement pride envy anxiety "
        "jealousy"
    ),
    "a family member": (
        "mother father sister brother aunt uncle cousin grandmother grandfather mom dad son daughter grandma "
        "grandpa parent wife husband"
    ),
    "a room in a house": "kitchen bedroom bathroom living dining office garage basement attic closet hallway den",
    "a gemstone": "diamond ruby emerald sapphire opal amethyst topaz pearl garnet jade quartz turquoise",
    "a spice": (
        "cinnamon pepper salt ginger turmeric cumin paprika nutmeg clove saffron oregano basil garlic cardamom "
        "coriander thyme"
    ),
    "a nut": "almond walnut peanut cashew pecan pistachio hazelnut chestnut macadamia acorn coconut",
    "a holiday": "christmas easter thanksgiving halloween hanukkah valentine independence ramadan diwali new",
    "a hobby": (
        "reading painting gardening cooking fishing swimming hiking photography drawing knitting dancing writing "
        "running chess gaming baking cycling"
    ),
    "a board game": "chess monopoly checkers scrabble risk clue catan backgammon go candyland",
    "a kitchen tool": (
        "knife spoon fork pan pot spatula whisk blender oven toaster stove grater bowl plate ladle peeler"
    ),
    "a kind of weather": (
        "rain snow sun wind storm cloud fog hail sunny rainy cloudy windy snowy thunderstorm tornado hurricane hot cold"
    ),
}

TOPICS: dict[str, tuple[str, ...]] = {topic: tuple(accepted.split()) for topic, accepted in _LISTS.items()}
