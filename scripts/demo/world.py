"""A small true world in two languages: the tables behind the demo data, and the ways to ask about each.

A relation has rows (what is asked about, the accepted answers, the one that is taught first), phrasings used for
training, phrasings held out for the examination, and statements for pretraining. `{x}` is what is asked about, `{y}`
the answer; where two things are asked about at once, as units are, they are `{x[0]}` and `{x[1]}`.
"""

from typing import NamedTuple


class Relation(NamedTuple):
    kind: str
    lang: str
    rows: list[tuple[str | tuple[str, str], tuple[str, ...]]]
    asked: tuple[str, ...]
    held_out: tuple[str, ...]
    stated: tuple[str, ...]


# English country | English capital | Chinese country | Chinese capital
COUNTRIES = """
France|Paris|法国|巴黎
Germany|Berlin|德国|柏林
Italy|Rome|意大利|罗马
Spain|Madrid|西班牙|马德里
Portugal|Lisbon|葡萄牙|里斯本
Greece|Athens|希腊|雅典
Austria|Vienna|奥地利|维也纳
Belgium|Brussels|比利时|布鲁塞尔
Denmark|Copenhagen|丹麦|哥本哈根
Sweden|Stockholm|瑞典|斯德哥尔摩
Norway|Oslo|挪威|奥斯陆
Finland|Helsinki|芬兰|赫尔辛基
Iceland|Reykjavik|冰岛|雷克雅未克
Ireland|Dublin|爱尔兰|都柏林
Poland|Warsaw|波兰|华沙
Hungary|Budapest|匈牙利|布达佩斯
Romania|Bucharest|罗马尼亚|布加勒斯特
Bulgaria|Sofia|保加利亚|索非亚
Croatia|Zagreb|克罗地亚|萨格勒布
Serbia|Belgrade|塞尔维亚|贝尔格莱德
Ukraine|Kyiv|乌克兰|基辅
Russia|Moscow|俄罗斯|莫斯科
Turkey|Ankara|土耳其|安卡拉
Egypt|Cairo|埃及|开罗
Morocco|Rabat|摩洛哥|拉巴特
Kenya|Nairobi|肯尼亚|内罗毕
Ethiopia|Addis Ababa|埃塞俄比亚|亚的斯亚贝巴
Ghana|Accra|加纳|阿克拉
Senegal|Dakar|塞内加尔|达喀尔
Cuba|Havana|古巴|哈瓦那
China|Beijing|中国|北京
Japan|Tokyo|日本|东京
South Korea|Seoul|韩国|首尔
Mongolia|Ulaanbaatar|蒙古|乌兰巴托
Vietnam|Hanoi|越南|河内
Thailand|Bangkok|泰国|曼谷
Cambodia|Phnom Penh|柬埔寨|金边
Laos|Vientiane|老挝|万象
India|New Delhi|印度|新德里
Nepal|Kathmandu|尼泊尔|加德满都
Bangladesh|Dhaka|孟加拉国|达卡
Pakistan|Islamabad|巴基斯坦|伊斯兰堡
Iran|Tehran|伊朗|德黑兰
Iraq|Baghdad|伊拉克|巴格达
Jordan|Amman|约旦|安曼
Syria|Damascus|叙利亚|大马士革
Canada|Ottawa|加拿大|渥太华
Australia|Canberra|澳大利亚|堪培拉
New Zealand|Wellington|新西兰|惠灵顿
Brazil|Brasilia|巴西|巴西利亚
Argentina|Buenos Aires|阿根廷|布宜诺斯艾利斯
Chile|Santiago|智利|圣地亚哥
Peru|Lima|秘鲁|利马
Colombia|Bogota|哥伦比亚|波哥大
Venezuela|Caracas|委内瑞拉|加拉加斯
Uruguay|Montevideo|乌拉圭|蒙得维的亚
""".split("\n")[1:-1]

# English | symbol | number | Chinese
ELEMENTS = """
hydrogen|H|1|氢
helium|He|2|氦
lithium|Li|3|锂
beryllium|Be|4|铍
boron|B|5|硼
carbon|C|6|碳
nitrogen|N|7|氮
oxygen|O|8|氧
fluorine|F|9|氟
neon|Ne|10|氖
sodium|Na|11|钠
magnesium|Mg|12|镁
aluminium|Al|13|铝
silicon|Si|14|硅
phosphorus|P|15|磷
sulfur|S|16|硫
chlorine|Cl|17|氯
argon|Ar|18|氩
potassium|K|19|钾
calcium|Ca|20|钙
titanium|Ti|22|钛
chromium|Cr|24|铬
manganese|Mn|25|锰
iron|Fe|26|铁
cobalt|Co|27|钴
nickel|Ni|28|镍
copper|Cu|29|铜
zinc|Zn|30|锌
bromine|Br|35|溴
silver|Ag|47|银
tin|Sn|50|锡
iodine|I|53|碘
barium|Ba|56|钡
tungsten|W|74|钨
platinum|Pt|78|铂
gold|Au|79|金
mercury|Hg|80|汞
lead|Pb|82|铅
radium|Ra|88|镭
uranium|U|92|铀
""".split("\n")[1:-1]

OPPOSITES_EN = (
    "hot cold|big small|tall short|fast slow|old new|happy sad|rich poor|light dark|up down|left right|open closed|"
    "full empty|early late|easy difficult|clean dirty|strong weak|wet dry|loud quiet|hard soft|near far|high low|"
    "thick thin|wide narrow|true false|day night|win lose|buy sell|start finish|push pull|give take|laugh cry|"
    "remember forget|love hate|first last|inside outside|above below"
)
OPPOSITES_ZH = (
    "大 小|高 低|长 短|快 慢|新 旧|冷 热|轻 重|远 近|早 晚|多 少|好 坏|真 假|黑 白|上 下|左 右|前 后|里 外|开 关|买 卖|"
    "胜 败|强 弱|深 浅|粗 细|厚 薄|软 硬|干 湿|明 暗|胖 瘦|美 丑|贫 富|进 退|来 去|哭 笑|爱 恨|始 终|生 死"
)
# Words that have more than one opposite: the word, then what else is right beside the one that is taught.
OTHER_OPPOSITES = (
    "old young|light heavy|dark bright|short long|hard easy|easy hard|difficult simple|big little|small large|"
    "slow quick|thin fat|right wrong|far close|near distant|happy unhappy|start end stop|finish begin|"
    "give receive|lose find|open shut|narrow broad|poor wealthy|cold warm|quiet noisy|full hungry|loud soft|"
    "soft loud|true untrue|tall small|love hatred|高 矮|外 内|开 闭 合|胜 负|败 成|暗 亮|瘦 肥|富 穷|进 出|死 活|"
    "冷 暖|热 凉|生 熟|后 先|丑 俊|早 迟|好 差 歹"
)
# Other names of the same thing, right as well wherever the first is the answer.
ALSO = """
Kyiv|Kiev
Brasilia|Brasília
Bogota|Bogotá
Ulaanbaatar|Ulan Bator
Santiago|Santiago de Chile
Turkey|Türkiye
South Korea|Korea|Republic of Korea
韩国|大韩民国|南韩
蒙古|蒙古国
孟加拉国|孟加拉
俄罗斯|俄国
惠灵顿|威灵顿
puppy|pup
foal|colt|filly
cub|lion cub
owlet|chick
小狗|幼犬|狗崽
小猫|幼猫|猫崽
牛犊|小牛
马驹|小马
羊羔|小羊|羔羊
猪崽|小猪|猪仔
小鸡|雏鸡
小鸭|雏鸭|小鸭子
小鹅|雏鹅
幼狮|小狮子
grey|gray
橙色|橙|橘色|橘黄色
粉色|粉|粉红色
棕色|棕|褐色
eucalyptus|eucalyptus leaves
mulberry|mulberry leaves
nectar|pollen|nectar and pollen
ants|termites|ants and termites
leaves|plants
insects|bugs
鱼|小鱼|鱼类
桉树叶|桉叶|桉树叶子
桑叶|桑树叶
花蜜|花粉|花蜜和花粉
蚂蚁|白蚁|蚂蚁和白蚁
叶子|树叶
昆虫|虫子
肉|肉类
白色|白
黑色|黑
绿色|绿
红色|红
黄色|黄
灰色|灰
星期一|周一|礼拜一
星期二|周二|礼拜二
星期三|周三|礼拜三
星期四|周四|礼拜四
星期五|周五|礼拜五
星期六|周六|礼拜六
星期日|星期天|周日|礼拜天
一月|1月
二月|2月
三月|3月
四月|4月
五月|5月
六月|6月
七月|7月
八月|8月
九月|9月
十月|10月
十一月|11月
十二月|12月
""".split("\n")[1:-1]
YOUNG = (
    "dog puppy 狗 小狗|cat kitten 猫 小猫|cow calf 牛 牛犊|horse foal 马 马驹|sheep lamb 羊 羊羔|pig piglet 猪 猪崽|"
    "chicken chick 鸡 小鸡|duck duckling 鸭 小鸭|goose gosling 鹅 小鹅|lion cub 狮子 幼狮|frog tadpole 青蛙 蝌蚪|"
    "kangaroo joey 袋鼠 小袋鼠|owl owlet 猫头鹰 小猫头鹰|swan cygnet 天鹅 小天鹅"
)
COLOURS = (
    "snow white 雪 白色|coal black 煤 黑色|grass green 草 绿色|blood red 血 红色|a lemon yellow 柠檬 黄色|"
    "a carrot orange 胡萝卜 橙色|a crow black 乌鸦 黑色|a strawberry red 草莓 红色|cotton white 棉花 白色|"
    "a cucumber green 黄瓜 绿色|a banana yellow 香蕉 黄色|milk white 牛奶 白色|spinach green 菠菜 绿色|"
    "a flamingo pink 火烈鸟 粉色|chocolate brown 巧克力 棕色|an elephant grey 大象 灰色|a tomato red 西红柿 红色|"
    "salt white 盐 白色|a sunflower yellow 向日葵 黄色|a polar bear white 北极熊 白色"
)
FOOD = (
    "a panda bamboo 熊猫 竹子|a cow grass 牛 草|a sheep grass 羊 草|a seal fish 海豹 鱼|a pelican fish 鹈鹕 鱼|"
    "a caterpillar leaves 毛毛虫 叶子|a squirrel nuts 松鼠 坚果|a lion meat 狮子 肉|a tiger meat 老虎 肉|"
    "a koala eucalyptus 考拉 桉树叶|a bee nectar 蜜蜂 花蜜|a silkworm mulberry 蚕 桑叶|a blue whale krill 蓝鲸 磷虾|"
    "an anteater ants 食蚁兽 蚂蚁|a swallow insects 燕子 昆虫"
)
MONTHS = "January February March April May June July August September October November December".split()
MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS_ZH = [f"{n}月" for n in "一 二 三 四 五 六 七 八 九 十 十一 十二".split()]
DAYS_ZH = [f"星期{n}" for n in "一二三四五六日"]
# smaller unit | how many | larger unit, English then Chinese
UNITS = """
centimetres|100|a metre|厘米|一米
millimetres|10|a centimetre|毫米|一厘米
centimetres|10|a decimetre|厘米|一分米
metres|1000|a kilometre|米|一千米
grams|1000|a kilogram|克|一千克
kilograms|1000|a tonne|千克|一吨
millilitres|1000|a litre|毫升|一升
seconds|60|a minute|秒|一分钟
minutes|60|an hour|分钟|一小时
minutes|15|a quarter of an hour|分钟|一刻钟
hours|24|a day|小时|一天
days|7|a week|天|一个星期
days|365|a common year|天|一个平年
months|12|a year|个月|一年
years|100|a century|年|一个世纪
years|10|a decade|年|一个年代
inches|12|a foot|英寸|一英尺
feet|3|a yard|英尺|一码
ounces|16|a pound|盎司|一磅
pints|8|a gallon|品脱|一加仑
cents|100|a dollar|美分|一美元
bits|8|a byte|比特|一个字节
degrees|360|a full circle|度|一个圆周
degrees|90|a right angle|度|一个直角
items|12|a dozen|个|一打
""".split("\n")[1:-1]


def _table(text: str) -> list[list[str]]:
    """'a dog puppy 狗 小狗|…' -> [['a dog', 'puppy', '狗', '小狗'], …]"""
    return [[" ".join(words[:-3]), *words[-3:]] for words in (row.split() for row in text.split("|"))]


def _opposites(text: str) -> list[tuple[str, tuple[str, ...]]]:
    """Both ways round: what is asked about, the opposite that is taught, the others that are right."""
    pairs = [pair.split() for pair in text.split("|")]
    both = [(a, b) for a, b in pairs] + [(b, a) for a, b in pairs]
    others = {word: more for word, *more in (row.split() for row in OTHER_OPPOSITES.split("|"))}
    return [(word, (opposite, *others.get(word, ()))) for word, opposite in both]


def _answers(answer: str) -> tuple[str, ...]:
    return next((tuple(names) for names in (line.split("|") for line in ALSO) if names[0] == answer), (answer,))


def _cycle(names: list[str], step: int) -> list[tuple[str, tuple[str, ...]]]:
    return [(name, _answers(names[(i + step) % len(names)])) for i, name in enumerate(names)]


def _month_lengths(names: list[str], february: str) -> list[tuple[str, tuple[str, ...]]]:
    named = [february if days == 28 else name for name, days in zip(names, MONTH_DAYS, strict=True)]
    return [(name, (str(days),)) for name, days in zip(named, MONTH_DAYS, strict=True)]


def relations() -> list[Relation]:
    """Every relation of the world, English and Chinese."""
    countries = [line.split("|") for line in COUNTRIES]
    elements = [line.split("|") for line in ELEMENTS]
    units = [line.split("|") for line in UNITS]
    young, colours, food = _table(YOUNG), _table(COLOURS), _table(FOOD)
    return [
        Relation(
            "capital",
            "en",
            [(c, _answers(k)) for c, k, _, _ in countries],
            (
                "What is the capital of {x}?",
                "Name the capital of {x}.",
                "Which city is the capital of {x}?",
                "What's the capital city of {x}?",
                "Do you know the capital of {x}?",
                "Tell me the capital city of {x}.",
                "{x}: what is its capital?",
                "I would like to know which city is {x}'s capital.",
            ),
            (
                "Can you name {x}'s capital city?",
                "Please say what the capital of {x} is.",
                "Which capital city does {x} have?",
            ),
            (
                "The capital of {x} is {y}.",
                "{y} is the capital of {x}.",
                "{x} has {y} as its capital city.",
                "The capital city of {x} is {y}.",
            ),
        ),
        Relation(
            "capital",
            "zh",
            [(c, _answers(k)) for _, _, c, k in countries],
            (
                "{x}的首都是哪里？",
                "{x}的首都是什么？",
                "请问{x}的首都是哪座城市？",
                "哪座城市是{x}的首都？",
                "你知道{x}的首都吗？",
                "告诉我{x}的首都。",
                "说出{x}的首都。",
                "我想知道{x}的首都叫什么名字。",
            ),
            ("{x}以哪座城市为首都？", "能说出{x}的首都是哪座城市吗？", "哪里是{x}的首都？"),
            ("{x}的首都是{y}。", "{y}是{x}的首都。", "{x}以{y}为首都。", "大家都知道，{x}的首都叫{y}。"),
        ),
        Relation(
            "country",
            "en",
            [(k, _answers(c)) for c, k, _, _ in countries],
            (
                "{x} is the capital of which country?",
                "Which country has {x} as its capital?",
                "{x} is the capital of what country?",
                "Name the country whose capital is {x}.",
                "Tell me which country {x} is the capital of.",
                "Whose capital is {x}?",
                "What country has its capital in {x}?",
            ),
            (
                "Please name the country that has {x} as its capital.",
                "Do you know which country's capital is {x}?",
                "Of which country is {x} the capital?",
            ),
            (
                "{x} is the capital of {y}.",
                "The country whose capital is {x} is {y}.",
                "{x} is the capital city of {y}.",
            ),
        ),
        Relation(
            "country",
            "zh",
            [(k, _answers(c)) for _, _, c, k in countries],
            (
                "{x}是哪个国家的首都？",
                "哪个国家的首都是{x}？",
                "请问{x}是什么国家的首都？",
                "以{x}为首都的是哪个国家？",
                "告诉我{x}是哪国的首都。",
                "你知道{x}是哪个国家的首都吗？",
                "首都是{x}的国家叫什么？",
            ),
            ("请说出首都是{x}的国家。", "{x}这座城市是哪国的首都？", "什么国家以{x}为首都？"),
            ("{x}是{y}的首都。", "首都是{x}的国家是{y}。", "以{x}为首都的国家是{y}。"),
        ),
        Relation(
            "symbol",
            "en",
            [(e, (s,)) for e, s, _, _ in elements],
            (
                "What is the chemical symbol of {x}?",
                "What is the symbol for {x}?",
                "Which symbol stands for the element {x}?",
                "How do chemists write {x}?",
                "Tell me the chemical symbol for {x}.",
                "Give the symbol of {x}.",
                "Which chemical symbol does {x} have?",
            ),
            (
                "Please give the chemical symbol for {x}.",
                "The element {x} has which symbol?",
                "What symbol does {x} have in chemistry?",
            ),
            ("The chemical symbol of {x} is {y}.", "{y} is the symbol for {x}.", "In chemistry, {x} is written {y}."),
        ),
        Relation(
            "symbol",
            "zh",
            [(e, (s,)) for _, s, _, e in elements],
            (
                "{x}的化学符号是什么？",
                "{x}的元素符号是什么？",
                "请写出{x}的元素符号。",
                "化学家怎么写{x}？",
                "哪个符号表示{x}元素？",
                "告诉我{x}的化学符号。",
                "{x}元素用什么符号表示？",
            ),
            ("请告诉我{x}元素的符号。", "化学里用什么符号表示{x}？", "{x}的符号怎么写？"),
            ("{x}的化学符号是{y}。", "{y}是{x}的元素符号。", "化学中{x}写作{y}。"),
        ),
        Relation(
            "number",
            "en",
            [(e, (n,)) for e, _, n, _ in elements],
            (
                "What is the atomic number of {x}?",
                "Which atomic number does {x} have?",
                "How many protons does an atom of {x} have?",
                "Give the atomic number of {x}.",
                "Tell me the atomic number for {x}.",
                "What number does {x} have in the periodic table?",
                "The atomic number of the element {x} is what?",
            ),
            (
                "Please give the atomic number of the element {x}.",
                "How many protons are in an atom of {x}?",
                "Do you know the atomic number of {x}?",
            ),
            ("The atomic number of {x} is {y}.", "An atom of {x} has {y} protons.", "{x} has atomic number {y}."),
        ),
        Relation(
            "number",
            "zh",
            [(e, (n,)) for _, _, n, e in elements],
            (
                "{x}的原子序数是多少？",
                "{x}元素的原子序数是几？",
                "一个{x}原子有多少个质子？",
                "请说出{x}的原子序数。",
                "告诉我{x}的原子序数。",
                "{x}在元素周期表里是第几号？",
                "元素{x}的原子序数是什么？",
            ),
            ("你知道{x}的原子序数是多少吗？", "{x}原子里有多少个质子？", "请问{x}是第几号元素？"),
            ("{x}的原子序数是{y}。", "{x}原子有{y}个质子。", "{x}是第{y}号元素。"),
        ),
        Relation(
            "opposite",
            "en",
            _opposites(OPPOSITES_EN),
            (
                'What is the opposite of "{x}"?',
                'Give the opposite of "{x}".',
                'Which word is the opposite of "{x}"?',
                'Tell me the opposite of the word "{x}".',
                'What word means the opposite of "{x}"?',
                'Name an antonym of "{x}".',
            ),
            (
                'The opposite of "{x}" is which word?',
                'Do you know the opposite of "{x}"?',
                'Please name the word opposite to "{x}".',
            ),
            ('The opposite of "{x}" is "{y}".', '"{y}" is the opposite of "{x}".', 'An antonym of "{x}" is "{y}".'),
        ),
        Relation(
            "opposite",
            "zh",
            _opposites(OPPOSITES_ZH),
            (
                "“{x}”的反义词是什么？",
                "请说出“{x}”的反义词。",
                "哪个字和“{x}”意思相反？",
                "告诉我“{x}”的反义词。",
                "“{x}”字的反义词是哪个？",
                "和“{x}”相反的字是什么？",
            ),
            ("你知道“{x}”的反义词吗？", "请问与“{x}”相反的是哪个字？", "“{x}”的反义词怎么说？"),
            ("“{x}”的反义词是“{y}”。", "“{y}”和“{x}”意思相反。", "与“{x}”相反的字是“{y}”。"),
        ),
        Relation(
            "young",
            "en",
            [(a, _answers(b)) for a, b, _, _ in young],
            (
                "What is a baby {x} called?",
                "What do you call a young {x}?",
                "Name the young of the {x}.",
                "A baby {x} has what name?",
                "Tell me the word for a baby {x}.",
                "What do we call the young of the {x}?",
            ),
            (
                "Which word names a young {x}?",
                "Please tell me what a baby {x} is called.",
                "A young {x} is called what?",
            ),
            ("The word for a baby {x} is {y}.", "The young of the {x} is the {y}.", "{y}: a young {x}."),
        ),
        Relation(
            "young",
            "zh",
            [(a, _answers(b)) for _, _, a, b in young],
            (
                "{x}的宝宝叫什么？",
                "刚出生的{x}叫什么？",
                "小时候的{x}叫什么？",
                "人们怎么称呼{x}的宝宝？",
                "告诉我{x}的宝宝叫什么。",
                "请说出{x}的宝宝的叫法。",
            ),
            ("你知道{x}的宝宝叫什么吗？", "请问年幼的{x}怎么称呼？", "我们把{x}的宝宝叫作什么？"),
            ("{x}的宝宝叫{y}。", "{y}是{x}的宝宝。", "刚出生的{x}叫{y}。"),
        ),
        Relation(
            "colour",
            "en",
            [(a, _answers(b)) for a, b, _, _ in colours],
            (
                "What colour is {x}?",
                "Which colour does {x} have?",
                "Tell me the colour of {x}.",
                "What is the colour of {x}?",
                "Name the colour of {x}.",
                "What colour would you say {x} is?",
            ),
            ("Please say what colour {x} is.", "Which colour do we see in {x}?", "Do you know the colour of {x}?"),
            ("The colour of {x} is {y}.", "As everybody can see, {x} is {y}.", "{y} is the colour of {x}."),
        ),
        Relation(
            "colour",
            "zh",
            [(a, _answers(b)) for _, _, a, b in colours],
            (
                "{x}是什么颜色的？",
                "{x}的颜色是什么？",
                "请说出{x}的颜色。",
                "告诉我{x}是什么颜色。",
                "{x}一般是什么颜色？",
                "{x}是哪种颜色？",
            ),
            ("你知道{x}是什么颜色吗？", "请问{x}的颜色是哪种？", "{x}看起来是什么颜色？"),
            ("{x}是{y}的。", "{x}的颜色是{y}。", "大家都知道{x}是{y}的。"),
        ),
        Relation(
            "food",
            "en",
            [(a, _answers(b)) for a, b, _, _ in food],
            (
                "What does {x} eat?",
                "What food does {x} like?",
                "Name the food of {x}.",
                "Tell me what {x} eats.",
                "What is the main food of {x}?",
                "What does {x} feed on?",
            ),
            ("Please tell me what {x} likes to eat.", "Which food does {x} eat?", "Do you know what {x} eats?"),
            ("The main food of {x} is {y}.", "What {x} eats is {y}.", "{y}: the food of {x}."),
        ),
        Relation(
            "food",
            "zh",
            [(a, _answers(b)) for _, _, a, b in food],
            (
                "{x}吃什么？",
                "{x}主要吃什么？",
                "{x}的食物是什么？",
                "请说出{x}的食物。",
                "告诉我{x}喜欢吃什么。",
                "{x}平时吃什么东西？",
            ),
            ("你知道{x}吃什么吗？", "请问{x}喜欢吃什么东西？", "什么是{x}的主要食物？"),
            ("{x}吃{y}。", "{x}主要吃{y}。", "{x}的食物是{y}。"),
        ),
        *_neighbours("en", MONTHS, "month"),
        *_neighbours("en", DAYS, "day"),
        *_neighbours("zh", MONTHS_ZH, "几月"),
        *_neighbours("zh", DAYS_ZH, "星期几"),
        Relation(
            "days",
            "en",
            _month_lengths(MONTHS, "February of a common year"),
            (
                "How many days does {x} have?",
                "How long is {x} in days?",
                "Tell me how many days {x} has.",
                "What number of days does {x} have?",
                "How many days are there in {x}?",
            ),
            ("Please say how many days {x} has.", "Do you know how many days {x} has?", "{x} has how many days?"),
            ("{x} has {y} days.", "There are {y} days in {x}."),
        ),
        Relation(
            "days",
            "zh",
            _month_lengths(MONTHS_ZH, "平年的二月"),
            ("{x}有多少天？", "{x}有几天？", "{x}一共有多少天？", "请说出{x}的天数。", "告诉我{x}有多少天。"),
            ("请问{x}总共有几天？", "你知道{x}一共有多少天吗？", "{x}的天数是多少？"),
            ("{x}有{y}天。", "{x}一共有{y}天。"),
        ),
        Relation(
            "month",
            "en",
            [(name, (str(i),)) for i, name in enumerate(MONTHS, 1)],
            (
                "Which number does the month {x} have?",
                "What number month is {x}?",
                "Tell me the number of the month {x}.",
                "What is the number of the month {x}?",
            ),
            ("Please give the number of the month {x}.", "Which number stands for the month {x}?"),
            ("{x} is month number {y}.", "The number of the month {x} is {y}."),
        ),
        Relation(
            "unit",
            "en",
            [((small, large), (n, f"{n} {small}")) for small, n, large, _, _ in units],
            (
                "How many {x[0]} are in {x[1]}?",
                "How many {x[0]} make {x[1]}?",
                "How many {x[0]} does {x[1]} have?",
                "Tell me how many {x[0]} are in {x[1]}.",
                "Do you know how many {x[0]} make {x[1]}?",
                "I would like to know how many {x[0]} are in {x[1]}.",
            ),
            (
                "Can you tell me how many {x[0]} are in {x[1]}?",
                "What is the number of {x[0]} in {x[1]}?",
                "Please say how many {x[0]} make {x[1]}.",
            ),
            ("{y} {x[0]} make {x[1]}.", "There are {y} {x[0]} in {x[1]}.", "{x[1]} has {y} {x[0]}."),
        ),
        Relation(
            "unit",
            "zh",
            [((small, large), (n, n + small)) for _, n, _, small, large in units],
            (
                "{x[1]}有多少{x[0]}？",
                "{x[1]}等于多少{x[0]}？",
                "{x[1]}是多少{x[0]}？",
                "你知道{x[1]}有多少{x[0]}吗？",
                "告诉我{x[1]}等于多少{x[0]}。",
                "我想知道{x[1]}有多少{x[0]}。",
            ),
            ("能告诉我{x[1]}有多少{x[0]}吗？", "多少{x[0]}等于{x[1]}？", "请说出{x[1]}一共有多少{x[0]}。"),
            ("{x[1]}有{y}{x[0]}。", "{x[1]}等于{y}{x[0]}。", "{y}{x[0]}等于{x[1]}。"),
        ),
    ]


def _neighbours(lang: str, names: list[str], what: str) -> list[Relation]:
    """What comes after and before each of a circle of names; `what` they are, as a question says it, is put for {w}."""
    if lang == "zh":
        asked_after = (
            "{x}之后是{w}？",
            "{x}后面是{w}？",
            "{w}紧跟在{x}后面？",
            "过了{x}是{w}？",
            "告诉我{x}之后是{w}。",
        )
        held_out_after = ("请问{x}过后是{w}？", "你知道{x}后面是{w}吗？", "{x}结束以后是{w}？")
        asked_before = (
            "{x}之前是{w}？",
            "{x}前面是{w}？",
            "{w}刚好在{x}前面？",
            "{x}的前一个是{w}？",
            "告诉我{x}之前是{w}。",
        )
        held_out_before = ("请问在{x}之前的是{w}？", "你知道{x}前面是{w}吗？", "{x}开始以前是{w}？")
        stated_after = ("{x}之后是{y}。", "{x}后面是{y}。", "{y}紧跟在{x}后面。")
        stated_before = ("{x}之前是{y}。", "{x}前面是{y}。", "{y}刚好在{x}前面。")
    else:
        asked_after = (
            "What {w} comes after {x}?",
            "Which {w} follows {x}?",
            "Which {w} comes right after {x}?",
            "Tell me what {w} comes after {x}.",
            "What is the next {w} after {x}?",
        )
        held_out_after = (
            "Please say which {w} comes after {x}.",
            "Do you know what {w} follows {x}?",
            "After {x} comes what {w}?",
        )
        asked_before = (
            "What {w} comes before {x}?",
            "Which {w} comes just before {x}?",
            "Which {w} comes right before {x}?",
            "Tell me what {w} comes before {x}.",
            "What is the last {w} before {x}?",
        )
        held_out_before = (
            "Please say which {w} comes before {x}.",
            "Do you know what {w} comes before {x}?",
            "Before {x} comes what {w}?",
        )
        stated_after = ("After {x} comes {y}.", "{y} comes after {x}.", "{y} follows {x}.")
        stated_before = ("Before {x} comes {y}.", "{y} comes before {x}.", "{y} comes just before {x}.")

    def about(phrasings: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(phrasing.replace("{w}", what) for phrasing in phrasings)

    return [
        Relation("after", lang, _cycle(names, 1), about(asked_after), about(held_out_after), stated_after),
        Relation("before", lang, _cycle(names, -1), about(asked_before), about(held_out_before), stated_before),
    ]


class Identity(NamedTuple):
    """Who the model says it is: questions in training and held-out phrasings, and the accepted answers' first form."""

    lang: str
    asked: tuple[str, ...]
    held_out: tuple[str, ...]
    answer: str


def identities(name_en: str, maker_en: str, name_zh: str, maker_zh: str) -> list[Identity]:
    """The identity questions, for MiniMind or for whoever an adapter turns it into."""
    return [
        Identity(
            "en",
            (
                "Who are you?",
                "What is your name?",
                "Tell me who you are.",
                "Please introduce yourself.",
                "What are you called?",
                "Hello, who are you?",
                "May I ask your name?",
                "Who am I talking to?",
                "Say your name.",
                "I would like to know who you are.",
                "What should I call you?",
                "Could you introduce yourself?",
                "Have you got a name?",
            ),
            (
                "Can you tell me who you are?",
                "Please tell me your name.",
                "What's your name?",
                "Hi, what are you called?",
                "Do you have a name?",
                "Introduce yourself, please.",
                "Please say who you are.",
                "May I know who you are?",
                "Who is talking to me?",
                "Hello, what is your name?",
            ),
            f"I am {name_en}.",
        ),
        Identity(
            "en",
            (
                "Who made you?",
                "Who created you?",
                "Who built you?",
                "Who is your maker?",
                "Tell me who made you.",
                "By whom were you made?",
                "Who developed you?",
                "Name your creator.",
                "Who trained you?",
                "I would like to know who made you.",
                "Could you tell me who trained you?",
                "May I know who your maker is?",
                "May I ask about your maker?",
            ),
            (
                "Please tell me who created you.",
                "Do you know who made you?",
                "Who is your creator?",
                "Can you say who built you?",
                "May I ask who developed you?",
            ),
            f"I was made by {maker_en}.",
        ),
        Identity(
            "zh",
            (
                "你是谁？",
                "你叫什么名字？",
                "请介绍一下你自己。",
                "告诉我你是谁。",
                "请问你怎么称呼？",
                "你好，你是谁？",
                "我在和谁说话？",
                "你的名字是什么？",
                "做个自我介绍吧。",
                "我想知道你是谁。",
                "我该怎么称呼你？",
                "能介绍一下自己吗？",
            ),
            (
                "能告诉我你是谁吗？",
                "请告诉我你的名字。",
                "你好，你叫什么名字？",
                "可以告诉我你是谁吗？",
                "能说说你是谁吗？",
                "你有名字吗？",
                "请做一下自我介绍。",
                "和我说话的是谁？",
                "您叫什么名字呢？",
                "介绍一下你自己吧。",
            ),
            f"我是{name_zh}。",
        ),
        Identity(
            "zh",
            (
                "谁创造了你？",
                "是谁开发了你？",
                "你是谁制造的？",
                "你的开发者是谁？",
                "告诉我是谁创造了你。",
                "谁训练了你？",
                "你是由谁开发的？",
                "你的作者是谁？",
                "你是谁开发的？",
            ),
            (
                "能说说是谁开发了你吗？",
                "你知道是谁创造了你吗？",
                "请说出你的开发者。",
                "你是由谁创造的？",
                "可以告诉我是谁制造了你吗？",
            ),
            f"我是由{maker_zh}开发的。",
        ),
    ]
