// A zip file of files that are compressed already and so are only stored. It is made of Blobs, of which
// browsers keep large ones on the disk. Without Zip64, so of up to 4 GB and 65535 files.

const MOST_FILES = 65_535;
const MOST_BYTES = 0xffffffff;

const TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  for (let bit = 0; bit < 8; bit++) byte = byte & 1 ? (byte >>> 1) ^ 0xedb88320 : byte >>> 1;
  return byte;
});

async function checksum(blob) {
  let crc = 0xffffffff;
  const reader = blob.stream().getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return ~crc >>> 0;
    for (let at = 0; at < value.length; at++) crc = (crc >>> 8) ^ TABLE[(crc ^ value[at]) & 0xff];
  }
}

// Numbers, each given as [bytes, value], in little-endian order, and after them the name.
function record(numbers, name) {
  const size = numbers.reduce((sum, [bytes]) => sum + bytes, 0);
  const view = new DataView(new ArrayBuffer(size));
  let at = 0;
  for (const [bytes, value] of numbers) {
    if (bytes === 2) view.setUint16(at, value, true);
    else view.setUint32(at, value, true);
    at += bytes;
  }
  return new Blob([view, name]);
}

// Give each file a name of its own: the second picture.png is picture-2.png.
export function uniqueNames(names) {
  const taken = new Set();
  return names.map((name) => {
    const [, stem, ending] = /^(.*?)(\.[^.]*)?$/s.exec(name);
    let free = name;
    for (let number = 2; taken.has(free.toLowerCase()); number++) free = `${stem}-${number}${ending || ""}`;
    taken.add(free.toLowerCase());
    return free;
  });
}

const UTF_8_NAMES = 0x0800;
const UNIX_FILE = 0o100644 << 16;

// `files`: {name, blob} each.
export async function createZip(files, modified = new Date()) {
  const bytes = files.reduce((sum, { blob }) => sum + blob.size + 512, 0);
  if (files.length > MOST_FILES || bytes > MOST_BYTES) {
    throw new Error(`A zip file made here holds up to ${MOST_FILES} files and 4 GB, which is less than these; choose JPEG, or download some at a time.`);
  }
  const time = (modified.getHours() << 11) | (modified.getMinutes() << 5) | (modified.getSeconds() >> 1);
  const day = ((Math.max(1980, modified.getFullYear()) - 1980) << 9) | ((modified.getMonth() + 1) << 5) | modified.getDate();
  const parts = [], directory = [];
  let at = 0;
  for (const { name, blob } of files) {
    const encoded = new TextEncoder().encode(name);
    const crc = await checksum(blob);
    const common = [[2, UTF_8_NAMES], [2, 0], [2, time], [2, day], [4, crc], [4, blob.size], [4, blob.size], [2, encoded.length], [2, 0]];
    const head = record([[4, 0x04034b50], [2, 20], ...common], encoded);
    directory.push(record([[4, 0x02014b50], [2, (3 << 8) | 20], [2, 20], ...common, [2, 0], [2, 0], [2, 0], [4, UNIX_FILE >>> 0], [4, at]], encoded));
    parts.push(head, blob);
    at += head.size + blob.size;
  }
  const size = directory.reduce((sum, one) => sum + one.size, 0);
  const end = record([[4, 0x06054b50], [2, 0], [2, 0], [2, files.length], [2, files.length], [4, size], [4, at], [2, 0]], "");
  return new Blob([...parts, ...directory, end], { type: "application/zip" });
}
