// Numbers, sizes and times as the reader's language writes them.
let language = () => "en";
export function useLanguage(of) { language = of; }
const locale = () => (language() === "zh" ? "zh-CN" : "en");

export function number(value, digits = 0) {
  return value === null || value === undefined ? "–" : value.toLocaleString(locale(), { maximumFractionDigits: digits });
}
export function loss(value) {
  return value === null || value === undefined ? "–" : value.toLocaleString(locale(), { minimumFractionDigits: 4, maximumFractionDigits: 4 });
}
export function rate(value) {
  return value === null || value === undefined ? "–" : value ? value.toExponential(2) : "0";
}
export function percent(value, digits = 0) {
  return value === null || value === undefined ? "–" : value.toLocaleString(locale(), { style: "percent", maximumFractionDigits: digits });
}
export function bytes(value) {
  if (value === null || value === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (value >= 1024 && at < units.length - 1) { value /= 1024; at += 1; }
  return `${number(value, at ? 1 : 0)} ${units[at]}`;
}
// seconds since 1970 -> "Nov 30, 01:05"
export function date(seconds) {
  if (!seconds) return "–";
  const options = { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" };
  return new Date(seconds * 1000).toLocaleString(locale(), options);
}
export function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
  const whole = Math.max(0, Math.round(seconds));
  const [h, m, s] = [Math.floor(whole / 3600), Math.floor((whole % 3600) / 60), whole % 60];
  const words = locale() === "en" ? ["h", "min", "s"] : ["小时", "分", "秒"];
  if (h) return `${h} ${words[0]} ${m} ${words[1]}`;
  return m ? `${m} ${words[1]} ${s} ${words[2]}` : `${s} ${words[2]}`;
}
