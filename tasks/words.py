"""
Words that the generated tasks are made of: plain lists in the tree, so that the same seed gives the same task anywhere.

NAMES   keys that something is said about ("The key of amber is ..."); no word twice, no word inside VALUES
VALUES  one-word answers
PEOPLE, PLACES, THINGS   the cast of the story simulator
SPELL   common words for spelling and letter counting

All are short and frequent (SPELL: counted over the source of the Python standard library), because a vocabulary of a few
thousand tokens holds such a word in one to three tokens, and an answer of few tokens is one that a small model can learn.
"""

NAMES = """
amber anchor apple arrow autumn badge baker banjo basil beacon birch blossom bronze camel candle canyon carbon castle
cedar cherry clover cobalt comet copper coral cotton crane crystal daisy delta desert dragon eagle ember falcon fern
flint forest fossil galaxy garden ginger glacier granite harbor hazel heron honey indigo island ivory jasmine jungle
kettle lantern lemon lily linen lotus magnet mango maple marble meadow melon mercury mint mirror moss needle nickel
nutmeg oasis olive onyx opal orchid otter oyster panda pearl pebble pepper pigeon pine planet plum pollen quartz quill
rabbit raven ribbon river ruby saddle salmon sapphire scarlet shadow silver sparrow spruce sunset temple thistle thunder
tiger topaz tulip turtle valley velvet violet walnut willow winter yellow zebra
""".split()

VALUES = """
area base bell bird block board boat book box bread bridge bus car card case chain chair circle city clock cloud coat
coin cold corn count cup day desk dog door drop dust earth edge engine face farm field film fire fish flag floor food
foot frame game gate glass gold grass green group hand hat heat hill home horse hour house ice iron key king knife lake
lamp land leaf letter level light line lock map mark metal milk minute moon mouse music nail name net night north note
number ocean oil page paint pan paper park path pen phone photo point pool port pot queen radio rain red ring road rock
roof room root rope rose salt sand school sea seat seed shape sheep ship shirt shop side sign sky snow soap sound south
space spoon spring star step stone storm street sugar sun table tail tape tea test time top town toy train tree truck
wall watch water wave week west wheel wind window wing wood word yard year
""".split()

PEOPLE = "Abel Bruna Corin Delia Edric Fenna Gus Hilda Ivo Jorun Kai Lena".split()
PLACES = "attic barn bath cellar chapel garden garage hall kitchen library office school tower yard".split()
THINGS = "apple ball book box coat cup flute hat key lamp milk pen ring spade".split()

SPELL = """
import from return class self else with that this except raise name used list value will append which only pass type
object have when should file module join must while string default function first break using into method other
after code line then more does data number call also there called error tuple path argument before case here like
same format open current split some each replace given text names instance start python values result empty methods
print need read than returns time already where continue support because finally range close items instead they next
been match returned check base assert without just exception make write since version specified found main either
arguments order available passed prefix both files user functions them needed following message these last single
objects command remove cannot find level otherwise bytes create source errors compile always defined possible
strings encoding mode index between copy specific exit true being done such optional contains parent about different
most calls want raised output test attribute types would what exists super standard input results until created work
their example characters added lines whether right through even above warnings global handle uses size part insert
interface keys could under multiple state another update warn over lower provided sequence still search left count
invalid change directory containing length platform ignore directly back strip classes long necessary based context
original valid parse extend system options clear means least contain sure property process defaults modules yield
character header required calling event item sorted itself root special avoid were decode group package attributes
exist named currently entry might form those keyword dictionary useful removed provides second never including once
know lambda include unknown running parameter below present target loop flag written encode help variable existing
nothing parser imports access issue point full well program debug supported local common node expected closed binary
override allow built mapping ignored extra instances reference simple library changed normal block later takes place
deprecated actually many sort protocol internal anything flags within space previous buffer during returning raises
exceptions correct integer keep zero unless details needs really requires content stream false extension possibly
tuples contents actual cases parameters skip additional times your every take changes register style convert
behavior provide variables allows versions enumerate something probably again build real handling supports action
parts matches complete position made around starting supplied matching element look float allowed tree stop title
though child numbers rather regular initial option operation elements delete reading setting makes pair accept
failed relative happen parsing pattern handler implement offset frame load down very entries equivalent pack define
less longer generated sets everything reset specify socket various headers escape width leading syntax transform
missing three wait testing connection appear bind status fail gets future explicitly trailing token lists usage tell
similar includes converted separate wrapper known final thread starts arbitrary script included store tests
underlying events determine children encoded safe force stored rest backwards maximum cache word modify implements
side section works iterable messages writing better particular assume exactly fails followed according stack
constants imported custom creating spaces negative callback partial send beginning environ window reverse inside
caller public comment references server date simply doing expression chars backward shared modified warning none
absolute depending control statement strict related limit spec specifies display prevent together flush client
executable associated clone extensions ensure cause compatible much entire filenames subclasses fields groups link
whose show pairs meaning checking remaining double address effect wrap email paths processing enough location
usually taken generate passing bound filter body char comments words request several attempt seen stuff threading
note column purpose release adds able received debugging seconds table equal shell adding fixed handled select
replaced readable commands overridden likely thing upper reason iterator occurs field sent checked lookup separator
total difference considered represents power core expand fill indicates plus depends bugs resulting require signal
looks positive generator indent suitable digits closing quote apply handles widget opened separated platforms
omitted view builtin wrong execution basic formatted algorithm wrapped properly problem save mark label seek started
setup dump loaded temporary blank definition against creates compiled nested cancel memory defines active deleted
structure checks suffix requested execute large making plain things recursive care hash chain trailer indicate runs
explicit report ends gives having disabled assumed verbose determined becomes pathname leave locals outside
conversion shutdown intended looking represent follows
""".split()
