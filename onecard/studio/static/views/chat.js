// Replaced by the view.
export default function () {}
