// The document as it is shown: its text, the passages that glow in it, and the strip beside it that shows all of it at once.
// Places are letters of the text as the server counts them: code points, not the halves that JavaScript counts.

const LEVELS = 5;
const canGlow = "highlights" in CSS;

// The whole words that a piece of text touches: tokens begin and end anywhere.
function words(text, from, to) {
  while (from < to && /\s/.test(text[from])) from++;
  while (to > from && /\s/.test(text[to - 1])) to--;
  if (from === to) return [from, to];
  while (from > 0 && /\S/.test(text[from - 1])) from--;
  while (to < text.length && /\S/.test(text[to])) to++;
  return [from, to];
}

export class DocumentView {
  constructor(article, map) {
    this.article = article;
    this.map = map;
    this.paragraphs = [];
    this.letters = 0;
    this.passages = [];
    map.addEventListener("click", event => {
      const share = event.offsetY / map.clientHeight;
      article.scrollTop = share * article.scrollHeight - article.clientHeight / 2;
    });
    article.addEventListener("scroll", () => this.draw(), { passive: true });
    new ResizeObserver(() => this.draw()).observe(map);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  show(text) {
    this.clear();
    this.article.replaceChildren();
    this.paragraphs = [];
    let start = 0;
    for (const line of text.split("\n")) {
      const paragraph = document.createElement("p");
      const node = document.createTextNode(line);
      paragraph.append(node);
      this.article.append(paragraph);
      const length = Array.from(line).length;
      this.paragraphs.push({ start, length, node, element: paragraph, isPlain: length === line.length });
      start += length + 1;
    }
    this.letters = Math.max(1, start - 1);
    this.article.hidden = this.map.hidden = false;
    this.article.scrollTop = 0;
    this.draw();
  }

  hide() {
    this.clear();
    this.article.hidden = this.map.hidden = true;
  }

  // passages: [first letter, last letter, weight 0 to 1]
  glow(passages) {
    this.passages = passages;
    if (canGlow) {
      const levels = Array.from({ length: LEVELS }, () => new Highlight());
      for (const [first, last, weight] of [...passages].sort((a, b) => a[2] - b[2])) {
        const level = Math.min(LEVELS - 1, Math.floor(weight ** 0.7 * LEVELS));
        for (const range of this.ranges(first, last)) levels[level].add(range);
      }
      levels.forEach((level, i) => { level.priority = i; CSS.highlights.set(`glow${i + 1}`, level); });
    }
    this.draw();
  }

  clear() {
    this.glow([]);
  }

  // Brings the heaviest passage into view, if it is not.
  reveal(passages) {
    const heaviest = passages.reduce((best, one) => (best && best[2] >= one[2] ? best : one), null);
    if (!heaviest) return;
    const at = this.paragraphs[this.paragraphAt(heaviest[0])];
    if (!at) return;
    const box = at.element.getBoundingClientRect(), own = this.article.getBoundingClientRect();
    if (box.bottom > own.bottom || box.top < own.top) at.element.scrollIntoView({ block: "center" });
  }

  // The letter under a point of the screen, or -1.
  letterAt(x, y) {
    let node, offset;
    if (document.caretPositionFromPoint) {
      const found = document.caretPositionFromPoint(x, y);
      if (found) [node, offset] = [found.offsetNode, found.offset];
    } else if (document.caretRangeFromPoint) {
      const found = document.caretRangeFromPoint(x, y);
      if (found) [node, offset] = [found.startContainer, found.startOffset];
    }
    const at = this.paragraphs.find(one => one.node === node);
    if (!at) return -1;
    return at.start + this.count(at, offset);
  }

  paragraphAt(letter) {
    let low = 0, high = this.paragraphs.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.paragraphs[middle].start <= letter) low = middle; else high = middle - 1;
    }
    return low;
  }

  *ranges(first, last) {
    for (let i = this.paragraphAt(first); i < this.paragraphs.length; i++) {
      const one = this.paragraphs[i];
      if (one.start >= last) return;
      const [from, to] = words(one.node.data, this.unit(one, first - one.start), this.unit(one, last - one.start));
      if (from >= to) continue;
      const range = new Range();
      range.setStart(one.node, from);
      range.setEnd(one.node, to);
      yield range;
    }
  }

  // The letters that glow for a passage: of whole words.
  shown(first, last) {
    const begin = this.paragraphs[this.paragraphAt(first)], end = this.paragraphs[this.paragraphAt(last - 1)];
    const [from] = words(begin.node.data, this.unit(begin, first - begin.start), this.unit(begin, last - begin.start));
    const [, to] = words(end.node.data, this.unit(end, first - end.start), this.unit(end, last - end.start));
    return [begin.start + this.count(begin, from), end.start + this.count(end, to)];
  }

  count(paragraph, unit) {
    return paragraph.isPlain ? unit : Array.from(paragraph.node.data.slice(0, unit)).length;
  }

  unit(paragraph, letters) {
    const wanted = Math.max(0, Math.min(letters, paragraph.length));
    return paragraph.isPlain ? wanted : Array.from(paragraph.node.data).slice(0, wanted).join("").length;
  }

  draw() {
    const map = this.map, ratio = devicePixelRatio || 1;
    if (map.hidden || !map.clientHeight) return;
    const style = getComputedStyle(document.documentElement), own = this.article;
    map.width = map.clientWidth * ratio;
    map.height = map.clientHeight * ratio;
    const pen = map.getContext("2d");
    pen.fillStyle = style.getPropertyValue("--line");
    pen.fillRect(map.width / 2 - ratio / 2, 0, ratio, map.height);
    const top = own.scrollTop / own.scrollHeight, share = own.clientHeight / own.scrollHeight;
    pen.globalAlpha = 0.5;
    pen.beginPath();
    pen.roundRect(map.width / 2 - 2 * ratio, top * map.height, 4 * ratio, Math.max(8 * ratio, share * map.height), 2 * ratio);
    pen.fill();
    pen.globalAlpha = 1;
    for (const [first, last, weight] of [...this.passages].sort((a, b) => a[2] - b[2])) {
      const level = Math.min(LEVELS, 2 + Math.floor(Math.sqrt(weight) * (LEVELS - 1)));
      pen.fillStyle = style.getPropertyValue(`--glow${level}`);
      const y = first / this.letters * map.height, high = (last - first) / this.letters * map.height;
      pen.fillRect(0, y, map.width, Math.max(2 * ratio, high));
    }
  }
}
