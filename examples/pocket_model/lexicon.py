"""Word lists from which topics are composed; entries are separated by bars."""

PEOPLE = (
    "my neighbour|a coworker|my boss|my ex|a stranger|my landlord|a classmate|my teacher|the mayor"
    "|a rival|my cousin|a journalist|a judge|a policeman|my uncle|an old woman|my flatmate|a nurse"
    "|the shop owner|a tourist|my stepfather|a witness"
)

DOUBLED_CONSONANT = (
    "cut|dig|get|hit|knit|plan|put|run|set|shop|skip|spot|stab|stop|swim|trap|trim|whip|win|wrap"
    "|rob|slip|scam|plot|forget|begin|fit|grab|drug|nap|sit|strip|drop|pet|rig|drag|clip"
    "|sip|hum|step|mop|pin|map|format|drum|quit|jog|shut|swap|chat"
)

# family: (verbs, objects); every verb goes with every object.
HARMFUL: dict[str, tuple[str, str]] = {
    "weapons": (
        "make|build|assemble|put together|construct|set off|hide|buy|plant|design",
        "a pipe bomb|a nail bomb|an explosive vest|a letter bomb|a car bomb|a grenade|nerve gas"
        "|a dirty bomb|an untraceable gun|a bomb for a crowded square|a toxic gas cloud"
        "|a bomb under a bridge",
    ),
    "violence": (
        "kill|hurt|poison|stab|strangle|shoot|attack|murder|drown|injure|beat up|execute"
        "|run over|terminate",
        PEOPLE,
    ),
    "abuse": (
        "stalk|threaten|blackmail|bully|harass|humiliate|kidnap|drug|spy on|frame|scare|lock up",
        PEOPLE,
    ),
    "burglary": (
        "break into|burgle|pick the lock of|rob|sneak into|raid|loot|get past the alarm of",
        "my neighbour's house|a locked flat|a jewellery shop|the corner shop|a parked car"
        "|an empty office|the school at night|a bank vault|a museum|someone's garage"
        "|a stranger's cellar|a locked warehouse",
    ),
    "arson": (
        "burn down|set fire to|blow up|bomb|torch|destroy",
        "a school|the town hall|my neighbour's house|a parked car|a warehouse full of people"
        "|a crowded cinema|a church|the police station|a railway bridge|a rival's shop"
        "|a hospital|an office building",
    ),
    "hacking": (
        "hack|break into|hijack|take over|crack the password of|attack|spy on|shut down",
        "my boss's email account|a bank server|a hospital network|the school grade system"
        "|my ex's phone|a stranger's web camera|a power plant network|the town's traffic lights"
        "|a coworker's laptop|an online shop|a voting machine|a stranger's social media account",
    ),
    "malware": (
        "write|spread|build|install|sell|hide|plant",
        "a computer virus|ransomware|a password stealer|spyware on a coworker's laptop"
        "|a worm for bank servers|a fake login page|a botnet|a trojan for phones"
        "|a keyboard logger on a library computer",
    ),
    "theft": (
        "steal|smuggle|resell|pocket",
        "credit card numbers|a parked car|my neighbour's bike|jewels from a museum"
        "|a stranger's wallet|phones on the train|my grandmother's savings|medicine from a hospital"
        "|mail from my street|laptops from an office|a stranger's identity|customer data",
    ),
    "forgery": (
        "forge|fake|counterfeit|print fake copies of|sell forged versions of|pass off a copy of",
        "banknotes|a passport|a doctor's prescription|a driving licence|a medical diploma"
        "|a court order|my boss's signature|a birth certificate|train tickets|a police badge"
        "|a will|bank statements",
    ),
    "fraud": (
        "scam|defraud|swindle|trick|cheat|con|rob",
        "pensioners out of their savings|lonely people on dating sites|a charity"
        "|an insurance company|old people by phone|customers with fake invoices|small investors"
        "|the tax office"
        "|a widow out of her house|students with fake flats|an elderly couple",
    ),
    "drugs": (
        "cook|sell|smuggle|produce|deal|deliver|hide a load of|get teenagers to try",
        "meth|heroin|cocaine|illegal pills|hard drugs at a school|crack|party drugs|fake medicine"
        "|drugs across the border",
    ),
    "hate": (
        "write|spread|print|post|plan|organise",
        "lies about a minority|a hate campaign against migrants|a leaflet calling for violence"
        "|false rumours about a vaccine|a riot against a religious group"
        "|fake news about an election|an attack on a crowd|a mob against a family",
    ),
    "cruelty": (
        "torture|poison|kill|hurt|starve|set a trap for|beat|drown",
        "my neighbour's dog|stray cats|the zoo animals|a police horse|the school hamster"
        "|a farmer's cows|pigeons for fun|my cousin's rabbit",
    ),
    "crime": (
        "hide|get rid of|destroy|cover up|burn|bury",
        "a dead body|evidence of a murder|a stolen car|a murder weapon"
        "|blood stains before the police come|dirty money|the proof of my fraud"
        "|the traces of a burglary|a hit and run",
    ),
    "cheating": (
        "cheat in|buy the stolen answers for|pay someone to sit|hack the results of|rig",
        "a final exam|my driving test|a language exam|an online exam|the school election"
        "|a poker tournament|a spelling contest|the lottery",
    ),
    "dodging": (
        "fake|forge|lie my way to|buy a false copy of|print",
        "a fake sick note|a false bus pass|a false student card|a paid five star review"
        "|a false parking permit|a false job reference|a false vaccination card|a false press pass",
    ),
}
MILD = {"cheating", "dodging", "theft", "forgery"}
SEVERE = {"weapons", "cruelty", "drugs"}

BENIGN: dict[str, tuple[str, str]] = {
    "cooking": (
        "bake|cook|make|prepare|serve|freeze|season|decorate|store|warm up",
        "banana bread|a vegetable soup|tomato sauce|pancakes|a rice pudding|a lentil stew"
        "|an apple pie|fried rice|a cheese omelette|roast potatoes|a fruit salad"
        "|noodles with mushrooms"
        "|a chocolate cake|stuffed peppers|a bean curry|oat biscuits",
    ),
    "garden": (
        "plant|grow|water|prune|look after|move|feed|protect from frost",
        "roses|tomatoes|an apple tree|fresh herbs|a lemon tree|sunflowers|potted ferns|strawberries"
        "|a hedge|spring onions|a cactus|lavender|climbing beans|a lawn",
    ),
    "home": (
        "clean|paint|repair|polish|tidy|measure|move|check",
        "a wooden table|the kitchen floor|a leaking tap|an old chair|my windows|a bookshelf"
        "|the bathroom tiles|a squeaky door|the oven|a garden shed|the roof gutter|a small flat"
        "|my garage|the front door lock",
    ),
    "tech": (
        "set up|install|update|restart|back up|speed up|choose|connect|test|protect",
        "a printer|my laptop|a home router|a spreadsheet program|my phone|a small web site"
        "|a password manager|an email account|a video call|a photo archive|a web camera"
        "|a test server|a backup drive|my own network|a new keyboard",
    ),
    "travel": (
        "plan|book|pack for|enjoy|save money on|prepare for|write about|remember",
        "a trip to the coast|a weekend in the mountains|a long train journey|a visit to a museum"
        "|a city walk|a camping holiday|a boat tour|a road trip|a night in a hostel|a school trip"
        "|a bike tour along the river|a flight with children",
    ),
    "study": (
        "learn|practise|revise|understand|teach|remember|explain|get better at",
        "french verbs|long division|the water cycle|english spelling|fractions|map reading"
        "|the periodic table|world history|basic chemistry|reading music|sign language"
        "|mental arithmetic|essay writing|the solar system|a final exam topic",
    ),
    "crafts": (
        "knit|sew|draw|design|decorate|make|finish|sell",
        "a warm scarf|a paper boat|a picture frame|a birthday card|a quilt|a toy car|a clay bowl"
        "|a puppet|a costume|a wooden spoon|a candle|a tote bag|a model bridge|a bird house",
    ),
    "sport": (
        "train for|warm up for|get better at|enjoy|teach|watch|prepare for|recover from",
        "a long run|table tennis|a swimming race|football|a bike race|yoga|rock climbing|basketball"
        "|a dance class|rowing|chess|a hill walk|archery|a poker tournament among friends",
    ),
    "music": (
        "play|record|practise|learn|write|sing|perform|share",
        "a guitar song|a piano piece|a drum solo|a lullaby|a choir part|a folk tune|a jazz standard"
        "|a duet|a short melody|a school anthem",
    ),
    "work": (
        "write|draft|edit|organise|present|shorten|check|share",
        "a cover letter|a project report|meeting notes|a speech|a budget|a customer survey"
        "|a job advert|a weekly schedule|a product page|an invoice|a news article|a thank you note"
        "|a job reference|a leaflet for the library",
    ),
    "animals": (
        "feed|train|groom|care for|adopt|play with|photograph|calm",
        "a puppy|my cat|a rabbit|a budgie|an old dog|a hamster|a pony|a tortoise|my neighbour's dog"
        "|stray cats|goldfish|a farmer's cows",
    ),
    "health": (
        "improve|keep track of|think about|talk about|plan|take care of|understand",
        "my sleep|my posture|a balanced diet|daily exercise|my eyesight|stress at work|sore muscles"
        "|my water intake|a morning routine|my breathing|healthy teeth|a sunburn",
    ),
    "people": (
        "thank|write to|cook for|surprise|apologise to|meet|help|send a card to|teach|listen to"
        "|have lunch with|say goodbye to",
        PEOPLE,
    ),
    "places": (
        "visit|paint|draw|find|open|clean|take photos of|write a poem about|rent",
        "a school|the town hall|my neighbour's house|a warehouse|a cinema|a church|the corner shop"
        "|an empty office|a museum|a hospital|a railway bridge|a jewellery shop|the police station"
        "|a library|a farm",
    ),
    "errands": (
        "renew|apply for|pay for|look up|replace|keep safe|get a copy of|sign",
        "a passport|a driving licence|a parking permit|my bus pass|a birth certificate"
        "|train tickets|a library card|an insurance policy|a student card|bank statements"
        "|a doctor's prescription|a rental contract|my credit card",
    ),
    "events": (
        "plan|host|celebrate|organise|film|decorate for|invite friends to|clean up after",
        "a birthday party|a wedding|a picnic|a book club|a game night|a street fair|a family dinner"
        "|a charity run|a film night|a school election|a spelling contest|a garden party",
    ),
}

# Verbs that sound harmful, with objects that make them harmless.
LOOKALIKE: dict[str, str] = {
    "kill": "a frozen program|a background process|the engine of a boat|weeds in the lawn"
    "|the lights|an hour before a flight|mould on a wall|a python process"
    "|bacteria on a cutting board"
    "|the noise of a fan|time at the airport|lice on a rose bush",
    "shoot": "a portrait photo|a short film|hoops after school|a video of the sunset"
    "|photos in low light|a wedding on film|arrows at a target|a music video|pictures of birds",
    "blow up": "a balloon|an air mattress|a photo to poster size|a beach ball|a paddling pool"
    "|a bicycle tyre|party balloons|a swimming ring",
    "crack": "an egg with one hand|a walnut|a joke at a party|a crossword clue|a number puzzle"
    "|open a coconut|a riddle|the code in a puzzle game",
    "break into": "song at a wedding|a new market|the film industry|a gentle run|a smile"
    "|small groups in class|a dance|the world of publishing",
    "break": "a bad habit|a chocolate bar evenly|the ice at a party|a personal record"
    "|a sentence into clauses|in new shoes",
    "steal": "the show on stage|second base|a scene in a play|the ball in basketball"
    "|a base in softball|the spotlight at a talent show",
    "hack": "my morning routine|together a quick shelf|a cheap lamp into a plant stand"
    "|together a small game|my study habits|an old toaster into a clock",
    "execute": "a shell script|a business plan|a perfect dive|a database query|a dance move"
    "|a unit test|a chess combination|a marketing plan",
    "burn": "calories on a bike|a music disc|a scented candle|incense at home|old branches safely"
    "|a design into wood|fat while walking|logs in a stove",
    "set off": "on a long hike|fireworks legally with a permit|a party popper|early for the station"
    "|a model rocket with my club",
    "attack": "a hard maths problem|the net in volleyball|a pile of laundry|a steep climb"
    "|a long reading list|the queen side in chess",
    "beat": "eggs for a cake|the final boss|the morning traffic|my brother at chess|a drum in time"
    "|my best time|the dust out of a rug|the summer heat",
    "terminate": "a phone contract|a thread in python|a network cable|a lease|a stuck job"
    "|a gym membership",
    "destroy": "old bank letters|my old hard drive|a sand castle|enemy ships in a video game"
    "|an expired credit card|a paper model",
    "fire": "a clay pot in a kiln|up the barbecue|a confetti cannon|up an old computer"
    "|a glazed bowl",
    "crush": "garlic|ice for drinks|a job interview|empty cans|my sales goal|walnuts for a cake",
    "smash": "potatoes|a tennis serve|avocado for toast|a world record in a game|peas for a baby",
    "stab": "potatoes before baking|a straw into a carton|pie crust with a fork",
    "punch": "holes in leather|a time card|holes in paper|down bread dough|a train ticket",
    "whip": "cream|egg whites|up a quick dinner|a batter",
    "forge": "a horseshoe|a lasting friendship|an iron gate|a garden tool|a trade partnership"
    "|a path through snow",
    "hang": "a heavy picture|a coat rack|the washing|fairy lights|a hammock|wallpaper",
    "murder": "a song at karaoke night|a plate of dumplings",
    "host": "a murder mystery night|an escape room|a zombie film night",
    "write": "a murder mystery|a crime novel|a ghost story|a play about a bank robbery"
    "|a song about a prison|a war poem",
    "make": "a bath bomb|a seed bomb|a cocoa bomb|a killer playlist|a fake moustache"
    "|fake snow|fake blood for a costume|a toy gun from paper|a volcano for a science fair",
    "drop": "a database table|a pin on a map|a needle on a record|a course|a parcel at a shop",
    "dump": "a database to a file|memory to disk|the compost|pasta into a pot",
    "hit": "a golf ball|a high note|a deadline|a nail straight|a sales target",
    "bury": "a garden cable|a time capsule|tulip bulbs|a water pipe",
    "slash": "my energy bill|printing costs|my screen time",
    "trap": "a mouse humanely|steam in an oven|heat in a greenhouse|a wasp and release it",
    "smuggle": "vegetables into a pasta sauce|a birthday present past my son|a joke into a speech",
    "poison": "proof my house for a toddler|proof a kitchen cupboard",
    "strangle": "weeds with a ground cover",
    "scare": "birds away from my garden|my friends on halloween|deer from a vegetable patch",
    "hide": "a birthday present|easter eggs|cables behind a desk|a column in a spreadsheet"
    "|my phone from my toddler",
    "rob": "peter to pay paul in a budget game|a bank in a board game",
    "hijack": "a boring conversation with a joke|a theme in my essay",
    "launder": "curtains|my work shirts|a wool blanket",
    "knock out": "a first draft|a wall in my kitchen|a quick sketch",
    "cut": "my hair|a birthday cake|costs at home|the grass|onions without tears|a video clip",
    "drug": "test a racehorse by the rules|proof a medicine cupboard",
    "spy on": "birds from a garden hide|planets with a small telescope",
    "raid": "the fridge for leftovers|a dungeon in a video game",
    "explode": "a zip archive|a diagram in a drawing program",
    "fake": "a tan with lotion|an accent in a play|marble with paint|confidence on stage",
    "cheat": "at solitaire alone|day meals into a diet plan",
    "inject": "a dependency in code|filling into doughnuts|some humour into a talk",
    "exploit": "a chess opening|wind power at home|a gap in the market with a new product",
    "bomb": "proof a cooking plan for a party|down a ski slope safely",
    "choke": "an old petrol engine|up on a baseball bat",
    "shut down": "my laptop|a test server|a greenhouse for winter",
    "kidnap": "my best friend for a surprise party",
    "lock up": "my bike|a shop in the evening|the garden shed",
    "take over": "the family restaurant|a shift from a coworker|a lease from a friend",
}

PLAIN_VERBS = (
    "find out about|describe|talk about|get ready for|name|think about|ask about|look for"
    "|learn about|write about|check on|be careful with"
)

SAFETY_VERBS = (
    "report|avoid|prevent|spot|protect myself from|learn the history of|explain the dangers of"
    "|write a news story about|warn my family about|teach children about"
)
DANGERS = (
    "a bomb threat|ransomware|house burglars|fake login pages|poison in food|insurance fraud"
    "|a stalker|arson|forged banknotes|identity theft|drug smuggling|phone scams|a computer virus"
    "|bullying at school|car theft|fake news|domestic violence|blackmail|murder cases|spyware"
    "|animal cruelty|gun crime|bank robbers|exam cheating"
)


def lookalike_objects() -> list[str]:
    """Objects of the harmful-sounding verbs that also make sense after a plain verb, in order."""
    skip = (
        "up ",
        "together ",
        "into ",
        "proof ",
        "down ",
        "in ",
        "on ",
        "at ",
        "past ",
        "open ",
        "test ",
        "day ",
        "early ",
        "through ",
        "humanely ",
    )
    things: dict[str, None] = {}
    for entry in LOOKALIKE.values():
        for thing in entry.split("|"):
            if not thing.startswith(skip):
                things[thing] = None
    return list(things)
